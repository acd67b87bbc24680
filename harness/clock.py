"""The clock: what a trial is charged for.

On the clock: building the submission, waiting for the training batch, forward, backward, the update and its
compilation, preparing the weights for an evaluation, whatever a submission does to choose data. Off the clock: building
model and data, warming up the fixed model, evaluation, logging, checkpoints.

The device is synchronised where a segment starts and where it ends and nowhere inside, so that the clock does not slow
what it measures. After an exception it is not: it may be waiting for a rank that is gone. Time is monotonic
(time.perf_counter).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.energy import meter


@dataclass
class Elapsed:
    """Accumulated seconds, and joules; every column but `total` holds time that has passed on this trial's behalf."""

    submission: float = 0.0
    """The training clock: all that a submission is charged for, the four columns below included."""
    build: float = 0.0
    """Building the submission on the model."""
    data_wait: float = 0.0
    """Selecting examples and waiting for the training batch."""
    compile: float = 0.0
    """Compiling the submission's own code, from an empty cache."""
    averaging: float = 0.0
    """Preparing weights for evaluations and putting the trained ones back."""
    cpu: float = 0.0
    """CPU seconds of this process while the training clock ran, all threads."""
    evaluation: float = 0.0
    logging: float = 0.0
    """Rows, tracker and checkpoints."""
    energy: float | None = None
    """Joules used while the training clock ran (harness/energy.py); None where they cannot be read."""
    total: float = 0.0
    """Wall time since the trial began, pauses between a kill and its resume left out."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Adds up a trial's time by column; `state_dict` makes it continue after a resume."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed = Elapsed()
        self.meter = meter(device)
        if self.meter is not None:
            self.elapsed.energy = 0.0
        self._compile = _CompileTime()
        self._total_mark = time.perf_counter()

    @contextmanager
    def submission(self, column: str | None = None, *, charge_compile: bool = True) -> Iterator[None]:
        """Run the training clock, and `column` beside it if named.

        charge_compile=False leaves compilation off: compiling again after a resume is not the submission's doing.
        """
        synchronize(self.device)
        compile_before = self._compile.seconds
        if self.meter is not None:
            self.meter.start()
        cpu, start = time.process_time(), time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            seconds = time.perf_counter() - start
            compiling = self._compile.seconds - compile_before
            if charge_compile:
                self.elapsed.compile += compiling
            else:
                seconds -= compiling
            self.elapsed.submission += seconds
            self.elapsed.cpu += time.process_time() - cpu
            if self.meter is not None and self.elapsed.energy is not None:
                self.elapsed.energy += self.meter.stop()
            if column is not None:
                self._add(column, seconds)

    @contextmanager
    def off(self, column: str) -> Iterator[None]:
        """Time that is recorded but not charged: `evaluation` or `logging`."""
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            self._add(column, time.perf_counter() - start)

    def data_wait(self, seconds: float) -> None:
        """Charged inside a segment already; here it gets its own column. Host time only, no synchronisation."""
        self.elapsed.data_wait += seconds

    def tick(self) -> None:
        """Bring `total` up to date."""
        now = time.perf_counter()
        self.elapsed.total += now - self._total_mark
        self._total_mark = now

    def state_dict(self) -> dict[str, float | None]:
        self.tick()
        return asdict(self.elapsed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.elapsed = Elapsed(**state)
        if self.meter is None:  # a part of the energy is no energy
            self.elapsed.energy = None
        self._total_mark = time.perf_counter()

    def _add(self, column: str, seconds: float) -> None:
        setattr(self.elapsed, column, getattr(self.elapsed, column) + seconds)


class _CompileTime:
    """Seconds torch.compile has spent in this process. Counts once a submission or model has loaded the compiler."""

    def __init__(self) -> None:
        self._total = 0.0
        self._start: float | None = None
        self._installed = False

    @property
    def seconds(self) -> float:
        if not self._installed and "torch._dynamo" in sys.modules:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._on_start)
            callback_handler.register_end_callback(self._on_end)
            self._installed = True
        return self._total

    def _on_start(self, _: object) -> None:
        self._start = time.perf_counter()

    def _on_end(self, _: object) -> None:
        if self._start is not None:
            self._total += time.perf_counter() - self._start
            self._start = None


class Disturbance:
    """Whether the machine was visibly busy with something else while a trial's clock ran.

    Two signs, either one flags the trial. Host: on a CPU the process got less than 90% of the CPU time its wall time
    allows. Spread: the slowest tenth of the training segments took more than 1.5 times the median per step.
    """

    CPU_SHARE = 0.9
    SPREAD = 1.5

    def __init__(self) -> None:
        self.seconds_per_step: list[float] = []

    def add(self, seconds: float, steps: float) -> None:
        if steps:
            self.seconds_per_step.append(seconds / steps)

    def summary(self, elapsed: Elapsed, device: torch.device) -> dict[str, float | bool | None]:
        # The first segment holds one-off costs (allocation, compilation of the update) and says nothing about noise.
        times = sorted(self.seconds_per_step[1:])
        spread = times[int(0.9 * (len(times) - 1))] / times[len(times) // 2] if len(times) >= 10 else None
        share = elapsed.cpu / elapsed.submission if device.type == "cpu" and elapsed.submission > 0 else None
        return {
            "cpu_seconds_per_second": share,
            "slow_segment_ratio": spread,
            "disturbed": bool((share is not None and share < self.CPU_SHARE) or (spread or 0) > self.SPREAD),
        }
