"""Signs of progress of a trial, for the process that watches it (harness/study/trial_process.py).

The trial's own code calls `show_progress` where it gets on: after a step, an evaluated batch, a phase such as loading
the data. No thread does it: a thread would go on while the trial hangs.
"""

from __future__ import annotations

import contextlib
import os
from time import monotonic

INTERVAL_SECONDS = 2.0
"""Between two signs at least, so that steps of a millisecond cost no system calls."""

_descriptor: int | None = None
_next_sign = 0.0


def send_progress_to(descriptor: int | None) -> None:
    """Write a byte into the pipe `descriptor` at each sign of progress from now on; None: no more."""
    global _descriptor, _next_sign
    _descriptor, _next_sign = descriptor, 0.0
    if descriptor is not None:
        # Where nobody reads, a full pipe must not stop the trial.
        os.set_blocking(descriptor, False)


def progress_descriptor() -> int | None:
    """The pipe that signs of progress go into; None where nobody watches."""
    return _descriptor


def show_progress() -> None:
    """Tell the watching process that this one does not hang. Does nothing where there is none."""
    global _next_sign
    if _descriptor is None or (now := monotonic()) < _next_sign:
        return
    _next_sign = now + INTERVAL_SECONDS
    # The pipe is full, or its reader is gone.
    with contextlib.suppress(OSError):
        os.write(_descriptor, b".")
