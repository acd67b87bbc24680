"""A trial in a process of its own: the same environment under every executor, independent of the parent's.

The parent holds the trial's lease and keeps the child's standard input open. When the parent dies, even by SIGKILL, the
child sees the end of its input and ends too. Threads, cores and GPU are set before torch is loaded.

The child shows its progress through a pipe. One that shows none for `executor.stall_minutes` hangs, in a driver, a
library or a reader of data: it writes its stack, is killed, and counts as crashed, so that it is tried again from its
checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from harness import log
from harness.config.schema import Run
from harness.errors import ProcessKilled, UserError
from harness.processes import PROGRESS_VARIABLE, SOURCE_ROOT, STACK_SIGNAL, describe_end
from harness.records.kills import is_kill
from harness.records.lease import Lease

logger = logging.getLogger(__name__)

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_END = "the process of the trial is at its end"
_STACK_SECONDS = 2.0
"""How long it may take for that."""
_INTERRUPT_SECONDS = 60.0
"""How long a child may go on after `interrupt` without a sign of progress: it may hang."""
_REPEAT_SECONDS = 5.0
"""A child that is still training so long after `interrupt` is interrupted again: an exception that is raised in a
destructor or a callback of a library is lost."""
_LOOK_SECONDS = 1.0
"""Between two looks whether the child hangs; its end and its signs of progress are seen at once."""
_KILL_SECONDS = 30.0
"""How long a killed child is waited for. One that hangs in a driver cannot end."""


@dataclass(frozen=True)
class Slot:
    """The cores or the GPU of a worker's trials. None: all that the process may use."""

    cores: tuple[int, ...] | None = None
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it."""


class TrialProcess:
    """The running process of one trial."""

    def __init__(self, run: Run, lease: Lease, slot: Slot, name: str = "trial") -> None:
        """Start the process. lease: of the trial's folder, which this process holds and lends to the child. name: of
        the trial, for the log."""
        self._name = name
        self._stall_seconds = 60 * run.executor.stall_minutes
        self._interrupted, self._interrupted_at = False, 0.0
        self.stop_reason: str | None = None
        """Why the process was killed, where it hung; in a sentence."""
        self.kill_cause: str | None = None
        """How the process was ended from outside, once `wait` has seen it; no crash."""
        self.reached_end = False
        """Whether the process came to the end of its own program, once `wait` has seen it."""
        environment = os.environ | {
            # Before the child starts: thread pools are sized when torch is imported.
            "OMP_NUM_THREADS": str(run.threads),
            "PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        receiver, sender = os.pipe()
        environment[PROGRESS_VARIABLE] = str(sender)
        # A file, so that it is closed with this object.
        self._progress = os.fdopen(receiver, "rb", buffering=0)
        request = {"run": run.model_dump(mode="json"), "token": lease.holder.token, "cores": slot.cores}
        # The child inherits the mask and unblocks the signals when torch is loaded (see main): an import swallows an
        # interrupt, or dies of it with a status that looks like a crash.
        former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._process = self._start(environment, sender)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
            # The child has its own, and the end of the pipe is seen when that is closed.
            os.close(sender)
        self._started = time.monotonic()
        cores = "any" if slot.cores is None else ", ".join(map(str, slot.cores))
        place = f"cores {cores}" if slot.gpu is None else f"GPU {slot.gpu}"
        logger.info("%s: process %d started on %s", name, self._process.pid, place)
        assert self._process.stdin is not None
        # Where the child has ended at once, `wait` tells why.
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    @staticmethod
    def _start(environment: dict[str, str], sender: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.study.trial_process"],
            stdin=subprocess.PIPE,
            # Nobody reads it, and a full pipe would block the child.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A library may write anything.
            errors="replace",
            env=environment,
            pass_fds=(sender,),
            # Ctrl-C reaches the parent alone, which passes it on.
            start_new_session=True,
        )

    def wait(self) -> str | None:
        """Wait for the end. None when the trial ended in its record or was stopped, here or from outside (see
        `kill_cause`), otherwise how its process ended.

        Raises UserError for errors that the user has to correct.
        """
        assert self._process.stdin is not None
        lines: list[str] = []
        # A child that fills the pipe would never end.
        reader = threading.Thread(target=self._read_errors, args=(lines,), daemon=True)
        reader.start()
        code = self._wait_for_end()
        # Processes that the child has left behind may keep the pipe open.
        reader.join(_STACK_SECONDS)
        errors = "".join(lines)
        seconds = time.monotonic() - self._started
        logger.info("%s: process %d ended with status %s after %.1f s", self._name, self._process.pid, code, seconds)
        if errors:
            logger.debug("%s: its process wrote to standard error:\n%s", self._name, errors.rstrip())
        # Not earlier: the end of its input tells the child that the parent is gone.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self.stop_reason is not None and code != 0:
            return None if self._interrupted else f"{self.stop_reason}\n{errors[-4000:]}".rstrip()
        self.reached_end = f"{_END}\n" in lines
        messages = [line.removeprefix("error: ").rstrip("\n") for line in lines if line.startswith("error: ")]
        # Without a message it is the submission that has ended the process.
        if code == 2 and messages:
            raise UserError(messages)
        if not self._interrupted and (code == 130 or is_kill(code)):
            self.kill_cause = _describe_kill(code, lines)
        # 0: the status is in the record, a crash included. 130: stopped, to be continued.
        if code in (0, 130) or is_kill(code):
            return None
        assert code is not None
        return f"the process of the trial ended {describe_end(code)}\n{errors[-4000:]}".rstrip()

    def _read_errors(self, lines: list[str]) -> None:
        """Append what the child writes to standard error, to its end. Its log records go to the log of this process as
        they come."""
        assert self._process.stderr is not None
        lines.extend(line for line in self._process.stderr if not log.receive(line, self._name))

    def _wait_for_end(self) -> int | None:
        """Wait for the end of the process, and kill it if it hangs. Its status; None if it did not even end then."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._progress, selectors.EVENT_READ)
            last = time.monotonic()
            while (code := self._process.poll()) is None:
                if selector.get_map() and selector.select(_LOOK_SECONDS):
                    if self._progress.read(4096):
                        last = time.monotonic()
                        if self._interrupted and last - self._interrupted_at >= _REPEAT_SECONDS:
                            logger.info("%s: it trains on after an interrupt, and gets another one", self._name)
                            self.interrupt()
                    else:
                        # Its end: the process is about to end.
                        selector.unregister(self._progress)
                elif not selector.get_map():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(_LOOK_SECONDS)
                if self._has_stalled(time.monotonic() - last):
                    return self._kill_stalled()
        return code

    def _has_stalled(self, seconds: float) -> bool:
        """Whether the process hangs that has shown no progress for so long."""
        if self._interrupted and seconds >= _INTERRUPT_SECONDS:
            return True
        return seconds >= self._stall_seconds

    def _kill_stalled(self) -> int | None:
        """Kill the process that hangs, once it has written its stack. Its status; None if it does not end."""
        self.stop_reason = (
            f"no progress for {self._stall_seconds / 60:g} minutes (executor.stall_minutes), so its process was "
            "killed; a larger ruleset.retries continues it from its checkpoint"
        )
        logger.warning("%s: %s", self._name, self.stop_reason)
        # The process of the submission too, where this is its judge.
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.send_signal(STACK_SIGNAL)
        self._send(STACK_SIGNAL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STACK_SECONDS)
        self.kill()
        try:
            return self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("%s: process %d does not end; its driver may hang", self._name, self._process.pid)
            return None

    def interrupt(self) -> None:
        """Stop the trial as Ctrl-C does; it can be continued."""
        self._interrupted_at, self._interrupted = time.monotonic(), True
        self._send(signal.SIGINT)

    def kill(self) -> None:
        """End the process at once; the trial can be continued from its last checkpoint."""
        self._send(signal.SIGKILL)

    @property
    def exit_status(self) -> int | None:
        """The status with which the process ended; None while it has not."""
        return self._process.poll()

    def is_alive(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def _send(self, number: signal.Signals) -> None:
        if self.is_alive():
            self._process.send_signal(number)


def _describe_kill(status: int | None, lines: Sequence[str]) -> str:
    """How a process was ended from outside, by its exit status and by what it wrote to standard error."""
    if status is not None and status < 0:
        return f"its process was killed {describe_end(status).replace('signal ', '')}"
    # The last line, where the process itself has noted the cause.
    return lines[-1].strip() if lines else "its process was stopped from outside"


def main() -> int:
    """Run in the child: read the request, run the trial, and return the exit status."""
    request: dict[str, Any] = json.loads(sys.stdin.readline())
    if request["cores"] is not None:
        # Before torch is imported, so that all its threads inherit the cores.
        os.sched_setaffinity(0, request["cores"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    progress_pipe = int(os.environ.pop(PROGRESS_VARIABLE))
    # Processes that a trial starts must not keep the pipe open.
    os.set_inheritable(progress_pipe, False)
    log.send_to_parent()
    # From here on torch is loaded, whose thread pools are sized on import.
    from harness.records.status import Status
    from harness.study.stop_rule import make_should_stop
    from harness.trial.liveness import send_progress_to, show_progress
    from harness.trial.remote_training import fork_trainee
    from harness.trial.trackers import make_tracker
    from harness.trial.trial import Observer, run_trial

    send_progress_to(progress_pipe)
    show_progress()
    run = Run(**request["run"])
    if run.judge == "process":
        fork_trainee()
    # SLURM sends it to all processes of a job whose time is over; the worker deals with it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # A scheduler's stop is like Ctrl-C: the trial ends as stopped. SIGINT too, which children inherit as ignored from a
    # shell's background jobs.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def make_observers() -> list[Observer]:
        tracker = make_tracker(run)
        return [] if tracker is None else [tracker]

    try:
        record, _ = run_trial(
            run, make_observers, make_should_stop=make_should_stop, retry=True, lease_token=request["token"]
        )
    except UserError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    # The process of the submission, before the trial had a record.
    except ProcessKilled as error:
        print(error, file=sys.stderr)
        return 130
    if record.status is Status.STOPPED:
        return 130
    # The last line: what ends the process before, `os._exit(0)` in a submission too, has not written it.
    print(_END, file=sys.stderr, flush=True)
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    # sys.exit would end this thread alone.
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Before the first step: the trial has not begun, or lies as it was left.
        sys.exit(130)
