"""Measures on the simulated device, in a process of its own, and prints a line of JSON for each thing measured.

    python -m tests.simulated_cuda.program LIBRARY

Each line of standard input is a request, ["submissions", NAME, ...] or ["trials", FILE]; END follows its results.
`submissions` trains each on the conformance problem. `trials` runs the trials of FILE, a JSON of arguments by name.
Both go on after a resume, and count what makes the host wait within the steps of training segments.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.simulated_cuda import library

STEPS = 4
"""Steps that are counted, before a resume and after it: with the others more than ten, the period of many methods."""
SETTLING = 2
"""Steps before them: the state is made, and what is cached is read."""

END = "end\n"
"""The line after the results of a request."""


def main(path: Path) -> None:
    library.load(path)
    # torch is imported here for the first time, and finds the device.
    from tests.simulated_cuda import device

    device.install()
    # What is loaded stays, and takes most of the time of a garbage collection.
    gc.collect()
    gc.freeze()
    with device.Device():
        for line in sys.stdin:
            kind, *rest = json.loads(line)
            for result in measure_submissions(rest) if kind == "submissions" else measure_trials(Path(rest[0])):
                print(json.dumps(result), flush=True)
            print(END, end="", flush=True)


@functools.cache
def count_waits() -> Any:
    """Count within training steps from now on, in whole steps: a segment waits for the device at both its ends."""
    from harness.trial.training import Training
    from tests.simulated_cuda.device import waits

    step = Training._step

    def counted_step(training: Training) -> Any:
        with waits.count():
            return step(training)

    Training._step = counted_step  # type: ignore[method-assign]
    return waits


def measure_submissions(names: list[str]) -> Iterator[dict[str, Any]]:
    """For each: waits by place in the source, before and after a resume, and an error if there was one."""
    import torch

    from harness.interface import ranks
    from harness.trial.conformance import make_subject, train_until

    # This build of torch has no NCCL.
    ranks.communication_backend = lambda: "gloo"  # type: ignore[attr-defined]
    waits = count_waits()
    for name in names:
        result: dict[str, Any] = {"name": name, "error": None}
        try:
            subject = make_subject(name, "device=cuda")
            training = subject.build()
            train_until(training, SETTLING)
            waits.places.clear()
            train_until(training, SETTLING + STEPS)
            result["before"] = dict(waits.places)
            buffer = io.BytesIO()
            torch.save(training.state_dict(), buffer)
            buffer.seek(0)
            resumed = subject.build()
            resumed.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))
            train_until(resumed, SETTLING + STEPS + 1)
            waits.places.clear()
            train_until(resumed, SETTLING + 2 * STEPS + 1)
            result["after"] = dict(waits.places)
        # Whatever it is, the test shows it.
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        yield result


def measure_trials(file: Path) -> Iterator[dict[str, Any]]:
    """For each: status and rows of the whole trial and of one that is interrupted at its first evaluation and resumed,
    and the waits of both by place in the source."""
    from harness.config.compose import load_run
    from harness.trial.trial import run_trial

    waits = count_waits()
    for name, arguments in json.loads(file.read_text()).items():
        result: dict[str, Any] = {"name": name}
        for label in ("whole", "cut"):
            waits.places.clear()
            run = load_run([*arguments, "device=cuda", "checkpoint_seconds=0", f"label={label}"])
            # What earlier ones left in cycles would count as memory of the next.
            gc.collect()
            if label == "cut":
                run_trial(run, lambda: [_Interruption()])
                gc.collect()
            record, _ = run_trial(run)
            final = record.manifest.final if record.manifest else None
            result[label] = {
                "status": str(record.status),
                "traceback": final.traceback if final else None,
                "rows": record.rows,
                "waits": dict(waits.places),
            }
        yield result


class _Interruption:
    """An observer that interrupts the trial after its first checkpoint."""

    evaluations = 0

    def begin(self, record: Any, first_step: float) -> None:
        """Nothing is shown."""

    def evaluation(self, row: Any) -> None:
        self.evaluations += 1
        if self.evaluations == 2:
            raise KeyboardInterrupt

    def end(self, record: Any) -> None:
        """Nothing is shown."""


if __name__ == "__main__":
    # Messages of torch's libraries go to the standard error.
    with contextlib.redirect_stderr(sys.stderr):
        main(Path(sys.argv[1]))
