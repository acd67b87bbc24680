"""Measures on the simulated device, in a process of its own, and prints a line of JSON for each thing measured.

    python -m tests.simulated_cuda.program LIBRARY submissions NAME ...
    python -m tests.simulated_cuda.program LIBRARY trials FILE

`submissions` trains each on the conformance problem. `trials` runs the trials of FILE, a JSON of arguments by name, and
resumes each. Both count what makes the host wait within the steps of training segments.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.simulated_cuda import library

STEPS = 3
"""Steps that are counted, before a resume and after it."""
SETTLING = 2
"""Steps before them: the state is made, and what is cached is read."""


def main(arguments: list[str]) -> int:
    path, kind, *rest = arguments
    library.load(Path(path))
    # torch is imported here for the first time, and finds the device.
    from tests.simulated_cuda import device

    device.install()
    with device.Device():
        for result in measure_submissions(rest) if kind == "submissions" else measure_trials(Path(rest[0])):
            print(json.dumps(result), flush=True)
    return 0


def measure_submissions(names: list[str]) -> Iterator[dict[str, Any]]:
    """For each: waits per place in the source, before and after a resume, and an error if there was one."""
    import torch

    from harness.trial.conformance import make_subject, train_until
    from harness.trial.training import Training
    from tests.simulated_cuda.device import waits

    step = Training._step

    def counted_step(training: Training) -> Any:
        # Not the whole segment, whose two ends wait for the device.
        with waits.count() if counting[0] else nullcontext():
            return step(training)

    counting = [False]
    Training._step = counted_step  # type: ignore[method-assign]
    for name in names:
        result: dict[str, Any] = {"name": name, "error": None}
        waits.places.clear()
        try:
            subject = make_subject(name, "device=cuda")
            training = subject.build()
            counting[0] = False
            train_until(training, SETTLING)
            counting[0] = True
            train_until(training, SETTLING + STEPS)
            result["before"] = dict(waits.places)
            waits.places.clear()
            counting[0] = False
            buffer = io.BytesIO()
            torch.save(training.state_dict(), buffer)
            buffer.seek(0)
            resumed = subject.build()
            resumed.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))
            train_until(resumed, SETTLING + STEPS + 1)
            counting[0] = True
            train_until(resumed, SETTLING + 2 * STEPS + 1)
            result["after"] = dict(waits.places)
        # Whatever it is, the test shows it.
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        yield result


def measure_trials(file: Path) -> Iterator[dict[str, Any]]:
    """For each: its rows, uninterrupted and resumed, the waits within its steps, and bytes on the device."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
