"""A trial in a process of its own: the same environment under every executor, whatever ran before in the parent.

The parent holds the trial's lease and keeps the child's standard input open; when the parent dies, however it dies, the
child sees the end of its input and goes too. Threads, cores and GPU are set before torch is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Run
from harness.lease import Lease
from harness.problems import UserError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Place:
    """What a worker's trials run on. None: whatever the process has."""

    cores: tuple[int, ...] | None = None
    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it."""


class Child:
    """The running process of one trial."""

    def __init__(self, run: Run, lease: Lease, place: Place) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(run.threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if place.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place.gpu
        request = {"run": run.model_dump(mode="json"), "token": lease.holder.token, "cores": place.cores}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.process"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
        )  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended at once; wait() tells

    def wait(self) -> str | None:
        """None when the trial ended in its record (or was stopped), else why its process ended without a word.

        UserError for what the user must mend.
        """
        assert self._process.stderr is not None and self._process.stdin is not None
        errors = self._process.stderr.read()
        code = self._process.wait()
        self._process.stdin.close()
        if code == 2:
            raise UserError([line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: ")]
                            or errors)  # fmt: skip
        if code in (0, 130):
            return None
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"the process of the trial ended {how}\n{errors[-4000:]}".rstrip()

    def interrupt(self) -> None:
        """Stop the trial as Ctrl-C does; it can be continued."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)


def main() -> int:
    """The child."""
    request: dict[str, Any] = json.loads(sys.stdin.readline())
    if request["cores"] is not None:
        os.sched_setaffinity(0, request["cores"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    from harness.record import Status
    from harness.tracker import make_tracker
    from harness.trial import Observer, run_trial

    run = Run(**request["run"])

    def observers() -> list[Observer]:
        tracker = make_tracker(run)
        return [] if tracker is None else [tracker]

    try:
        record, _ = run_trial(run, observers, retry=True, lease_token=request["token"])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    return 130 if record.status is Status.STOPPED else 0


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
