"""Processes that are forked from one that has loaded torch: a new interpreter takes seconds of a core to load it.

For tests of what a process does, is sent, or leaves behind. Those of how it starts use `processes.run`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from harness.processes import PROGRESS_VARIABLE
from harness.trial import remote_training
from tests.processes import DEADLINE_SECONDS

PARENT_VARIABLE = "PACEMARK_TEST_PARENT"
TRAINEE_VARIABLE = "PACEMARK_TEST_TRAINEE"
"""Where it is set, a forked judge starts the process of the submission as outside of tests, as a child of its own."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch._dynamo", "pyarrow.csv", "rich.progress", "harness.trial.trial", "harness.trial.trackers",
    "harness.trial.trainee_process", "harness.study.stop_rule", "tests.conftest", "tests.harness.problem",
    "tests.harness.seams", "tests.submissions.parity", "workloads.gpt2", "tests.forked_from",
])  # fmt: skip
# Starting a process looks at all earlier ones, and two looks at one process at a time take its status from each other.
_lock = threading.Lock()


class ForkedProcess:
    """As a `subprocess.Popen` of `python -m MODULE ARGUMENTS` whose standard streams are pipes of text.

    Its parent, for the system, is the process that it is forked from; PARENT_VARIABLE holds the one that started it.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        progress: int | None = None,
        connection: int | None = None,
    ) -> None:
        """progress: a descriptor that the process gets as PROGRESS_VARIABLE says. connection: one whose number it gets
        as its last argument."""
        pipes = [_context.Pipe(duplex=False) for _ in range(3)]
        (stdin, self_stdin), (self_stdout, stdout), (self_stderr, stderr) = pipes
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        environment = dict(os.environ if env is None else env)
        # A judge is no other parent than the one that started it.
        if connection is None:
            environment[PARENT_VARIABLE] = str(os.getpid())
        # A Connection, which multiprocessing can send.
        pipe = None if progress is None else Connection(os.dup(progress), readable=False)
        link = None if connection is None else Connection(os.dup(connection))
        child = (module, arguments, environment, mask, (stdin, stdout, stderr), pipe, link, os.getpid())
        self._process = _context.Process(target=_run, args=child)
        with _lock:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        for end in filter(None, (stdin, stdout, stderr, pipe, link)):
            end.close()
        self.stdin = _open(self_stdin, "w")
        self.stdout = _open(self_stdout, "r")
        self.stderr = _open(self_stderr, "r")

    @property
    def returncode(self) -> int | None:
        """As Popen's, but never out of date."""
        return self.poll()

    def poll(self) -> int | None:
        """As Popen's."""
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float = DEADLINE_SECONDS) -> int:
        """As Popen's, with a deadline."""
        wait([self._process.sentinel], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return status

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        # It can end this moment.
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def communicate(self, timeout: float = DEADLINE_SECONDS) -> tuple[str, str]:
        """As Popen's. The deadline is that of the process, which is killed at it."""
        killer = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        killer.start()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        reader.start()
        printed = self.stdout.read()
        reader.join()
        self.wait()
        killer.cancel()
        return printed, errors[0]


def run(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, input: str = ""
) -> subprocess.CompletedProcess[str]:
    """As `processes.run` of `python -m MODULE ARGUMENTS`."""
    process = ForkedProcess(module, *arguments, env=env)
    process.stdin.write(input)
    process.stdin.close()
    printed, errors = process.communicate()
    return subprocess.CompletedProcess([module, *arguments], process.wait(), printed, errors)


def start_trial(environment: dict[str, str], sender: int) -> ForkedProcess:
    """In place of `TrialProcess._start`."""
    process = ForkedProcess("harness.study.trial_process", env=environment, progress=sender)
    # As there nobody reads what a trial prints.
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def launch_trainee(environment: dict[str, str], connection: int, progress: int | None) -> ForkedProcess:
    """In place of `harness.trial.remote_training.launch`."""
    process = ForkedProcess("harness.trial.trainee_process", env=environment, progress=progress, connection=connection)
    process.stdin.close()
    threading.Thread(target=process.stdout.read, daemon=True).start()
    threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()
    return process


def _pass_on(stream: Any) -> None:
    for line in stream:
        sys.stderr.write(line)


def _open(end: Connection, mode: str) -> Any:
    with end:
        return os.fdopen(os.dup(end.fileno()), mode, errors="replace")


def _run(
    module: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    mask: set[signal.Signals],
    streams: tuple[Connection, ...],
    progress: Connection | None,
    link: Connection | None,
    starter: int,
) -> None:
    """In the child: what a new interpreter would do."""
    if link is not None:
        _end_with(starter)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Ignored where a shell runs the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    # Its own children come from the same process, whose address it has: multiprocessing would start another one.
    forkserver._forkserver.ensure_running = lambda: None
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    if progress is not None:
        os.environ[PROGRESS_VARIABLE] = str(os.dup(progress.fileno()))
        progress.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if link is not None:
        arguments = (*arguments, str(os.dup(link.fileno())))
        link.close()
    # The process of a judged submission is forked too.
    if TRAINEE_VARIABLE not in os.environ:
        remote_training.launch = launch_trainee  # type: ignore[assignment]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(judge: int) -> None:
    """Let this process end with its judge, also while it is stopped or hangs. The kernel sees to it where the judge is
    the parent."""
    descriptors = [os.pidfd_open(judge), os.pidfd_open(os.getpid())]
    if watcher := os.fork():
        os.waitpid(watcher, 0)
        for descriptor in descriptors:
            os.close(descriptor)
        return
    # Twice, so that it is no child of the submission's process, of which the judge asks for an account.
    if os.fork():
        os._exit(0)
    # Whoever reads from the process waits until nobody else could write.
    for number in {*range(256)} - {*descriptors}:
        with contextlib.suppress(OSError):
            os.close(number)
    select.select(descriptors, [], [])
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptors[1], signal.SIGKILL)
    os._exit(0)
