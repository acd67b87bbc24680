"""Processes: the identity of this machine, whether a process is alive, and the ranks that a launcher started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PROGRESS_VARIABLE = "PACEMARK_PROGRESS_PIPE"
"""The environment variable that names the descriptor on which the process of a trial shows its progress."""
MARK_VARIABLE = "PACEMARK_SUBMISSION_PROCESS"
"""The environment variable by which a judge knows what the process of a submission starts and abandons."""
STACK_SIGNAL = signal.SIGUSR1
"""On it the processes of a trial write the stack of each thread to standard error, also while they hang in foreign
code."""
SOURCE_ROOT = Path(__file__).parents[1]
"""The folder that holds the packages harness, workloads, submissions and scripts."""


def host_id() -> str:
    """An identifier of this machine. It differs between reboots and containers, where process ids differ too."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def process_start_time(pid: int) -> str | None:
    """When process `pid` of this machine started, in clock ticks since boot.

    None if there is no such process or it is a zombie; an empty string where the system does not say.
    """
    try:
        # The name of the program, in brackets, may hold spaces and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        # No /proc on this system: only whether the process exists can be found out.
        return "" if _answers_signals(pid) else None
    # Fields 3 and 22 of proc(5); the first two, process id and name, are cut off above.
    state, start_time = fields[0], fields[19]
    return None if state == "Z" else start_time


def describe_end(status: int) -> str:
    """How a process ended, by its exit status, which is negative for a signal: "by signal SIGSEGV", "with status 3"."""
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by signal {signal.Signals(-status).name}"
    # Most real-time signals have no name.
    except ValueError:
        return f"by signal {-status}"


def _answers_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # The process exists and belongs to another user.
    except PermissionError:
        pass
    return True


def make_working_folder_importable() -> None:
    """Let class paths of the configuration name modules in the working folder, here and in processes started from here.

    After everything that is importable already: a folder `harness` or `workloads` there must not take the place of
    ours.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    former = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # The root too: a worker on a cluster starts with a bare Python, which finds an installed Pacemark by this alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(SOURCE_ROOT), *former, folder]))


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Within it SIGINT and SIGTERM wait: an exception that a handler raises inside of torch.save becomes another error
    there, or is lost. Does nothing outside of the main thread, which alone runs handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, lambda number, _: pending.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if pending:
        # To itself, so that the former handler is called as it would have been.
        os.kill(os.getpid(), pending[0])


# ---- what torchrun says about this process, in environment variables -----------------------------------------------


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process beside others."""
    return world_size() > 1


def is_main_process() -> bool:
    """Whether this process is rank 0, which owns the record and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0
