"""The clock: the seconds that a trial is charged for.

On the clock: building the submission, waiting for the training batch, forward, backward, the update and its
compilation, preparing the weights for an evaluation, and the choice of data by a submission. Off the clock: building
model and data, warming up the fixed model, evaluation, logging, checkpoints.

The device is synchronised where a segment starts and where it ends and nowhere inside, so that the clock does not slow
what it measures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.trial.energy import make_meter


@dataclass
class Elapsed:
    """Accumulated seconds, and joules. All columns but `total` are measured only while this trial is active."""

    submission: float = 0.0
    """The training clock: all that a submission is charged for. Includes the next four columns."""
    build: float = 0.0
    """Building the submission on the model."""
    data_wait: float = 0.0
    """Selecting examples and waiting for the training batch; on a GPU as long as the GPU waits (`DataWait`)."""
    compile: float = 0.0
    """Compiling the submission's own code, from an empty cache."""
    averaging: float = 0.0
    """Preparing weights for evaluations and putting the trained ones back."""
    cpu: float = 0.0
    """CPU seconds of all threads of this process while the training clock ran."""
    evaluation: float = 0.0
    """Evaluations, without the preparation of the weights."""
    logging: float = 0.0
    """Rows, tracker and checkpoints."""
    energy: float | None = None
    """Joules used while the training clock ran (harness/trial/energy.py); None where they cannot be read."""
    total: float = 0.0
    """Wall time since the trial began, without the pauses between a kill and its resume."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Adds up a trial's time by column; `state_dict` makes it continue after a resume."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed = Elapsed()
        # None where no energy counter can be read.
        self.meter = make_meter(device)
        self._data_wait = DataWait(device)
        if self.meter is not None:
            self.elapsed.energy = 0.0
        self._compile = _CompileTime()
        # Seconds of `_compile` that went into the workload's model.
        self._model_compile = 0.0
        self._total_mark = time.perf_counter()

    @contextmanager
    def submission(self, column: str | None = None, *, charge_compile: bool = True) -> Iterator[None]:
        """Run the training clock, and the column `column` of `Elapsed` beside it if given.

        charge_compile=False does not charge compilation: compiling again after a resume is not the submission's fault.
        Compilation within `model_compilation` is never charged. Segments must not be nested.
        """
        synchronize(self.device)
        compile_before, model_compile_before = self._compile.seconds, self._model_compile
        if self.meter is not None:
            self.meter.start()
        # Read last, so that reading the energy counters is not charged. perf_counter is monotonic.
        cpu, start = time.process_time(), time.perf_counter()
        is_complete = False
        try:
            yield
            # Not in `finally`: after an exception the device may be waiting for a lost rank.
            synchronize(self.device)
            is_complete = True
        finally:
            # First, so that the bookkeeping below is not charged.
            seconds = time.perf_counter() - start
            of_model = self._model_compile - model_compile_before
            compiling = self._compile.seconds - compile_before - of_model
            seconds -= of_model
            if charge_compile:
                self.elapsed.compile += compiling
            else:
                seconds -= compiling
            self.elapsed.submission += seconds
            self.elapsed.data_wait += self._data_wait.take_seconds() if is_complete else 0.0
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

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the body to the column of data waiting, within a segment, which charges it already. Nothing waits for
        the device."""
        self._data_wait.begin()
        yield
        self._data_wait.end()

    @contextmanager
    def model_compilation(self) -> Iterator[None]:
        """Charge nothing that is compiled within the body: a pass of the workload's model, which is the same for every
        submission."""
        before = self._compile.seconds
        try:
            yield
        finally:
            self._model_compile += self._compile.seconds - before

    def restart(self) -> None:
        """Let `total` begin now."""
        self._total_mark = time.perf_counter()

    def tick(self) -> None:
        """Bring `total` up to date."""
        now = time.perf_counter()
        self.elapsed.total += now - self._total_mark
        self._total_mark = now

    def state_dict(self) -> dict[str, float | None]:
        """The accumulated times, for a checkpoint."""
        self.tick()
        return asdict(self.elapsed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's times."""
        self.elapsed = Elapsed(**state)
        if self.meter is None:
            # Energy of only a part of the trial would be read as that of the whole.
            self.elapsed.energy = None
        # The time between the kill and the resume does not count.
        self._total_mark = time.perf_counter()

    def _add(self, column: str, seconds: float) -> None:
        setattr(self.elapsed, column, getattr(self.elapsed, column) + seconds)


class DataWait:
    """Seconds between `begin` and `end`, as the device sees them.

    On a GPU the host runs ahead: its own time says nothing about whether the GPU had work. Events on the stream say how
    long the GPU took from the last operation before `begin` to the last one before `end`: it was idle, or busy with
    making the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._start = 0.0
        # Made once and used in every segment.
        self._events: list[tuple[Any, Any]] = []
        self._used = 0

    def begin(self) -> None:
        """Called before the batch is asked for."""
        if self._device.type != "cuda":
            self._start = time.perf_counter()
            return
        if self._used == len(self._events):
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._events[self._used][0].record(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """Called when all work on the batch has been given to the device."""
        if self._device.type != "cuda":
            self._seconds += time.perf_counter() - self._start
            return
        self._events[self._used][1].record(torch.cuda.current_stream(self._device))
        self._used += 1

    def take_seconds(self) -> float:
        """Seconds since the last call; the device must have been waited for."""
        # elapsed_time is in milliseconds.
        self._seconds += sum(start.elapsed_time(end) for start, end in self._events[: self._used]) / 1000
        self._used = 0
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CompileTime:
    """Seconds that torch.compile has spent in this process, counted once something has loaded the compiler."""

    def __init__(self) -> None:
        self._total = 0.0
        self._start: float | None = None
        self._installed = False

    @property
    def seconds(self) -> float:
        """Seconds of compilation so far."""
        # Importing the compiler takes long, and a trial that compiles nothing does without it. private_compiler_cache
        # has imported it wherever the submission compiles.
        if not self._installed and "torch._dynamo" in sys.modules:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._on_start)
            callback_handler.register_end_callback(self._on_end)
            self._installed = True
        return self._total

    def _on_start(self, _: object) -> None:
        self._start = time.perf_counter()

    def _on_end(self, _: object) -> None:
        # Callbacks registered during a compilation hear its end but not its start.
        if self._start is not None:
            self._total += time.perf_counter() - self._start
            self._start = None


class Disturbance:
    """Whether other load visibly disturbed a trial while its clock ran. Either of two signs is enough.

    On a CPU with one thread: the process got less than `MIN_CPU_SHARE` of the CPU time that its wall time allows. On
    any device: the slowest tenth of the training segments took more than `MAX_SLOW_RATIO` times the median per step.
    """

    MIN_CPU_SHARE = 0.9
    MAX_SLOW_RATIO = 1.5

    def __init__(self) -> None:
        self.seconds_per_step: list[float] = []

    def add_segment(self, seconds: float, steps: float) -> None:
        """Note how long a training segment took. steps: nominal steps, which may be a fraction."""
        if steps:
            self.seconds_per_step.append(seconds / steps)

    def summary(self, elapsed: Elapsed, device: torch.device, threads: int = 1) -> dict[str, float | bool | None]:
        """The figures of `FinalFigures` for the manifest: two ratios and the verdict; None where there is too little to
        tell."""
        # The first segment holds one-off costs (allocation, compilation of the update) and says nothing about noise.
        times = sorted(self.seconds_per_step[1:])
        # Fewer than ten segments have no slowest tenth.
        slow_ratio = times[int(0.9 * (len(times) - 1))] / times[len(times) // 2] if len(times) >= 10 else None
        # On a GPU the host waits most of the time, and of several threads all but one wait wherever an operation has no
        # work for them: there the CPU time says nothing.
        is_told = device.type == "cpu" and threads == 1 and elapsed.submission > 0
        cpu_share = elapsed.cpu / elapsed.submission if is_told else None
        return {
            "cpu_seconds_per_second": cpu_share,
            "slow_segment_ratio": slow_ratio,
            "disturbed": (cpu_share is not None and cpu_share < self.MIN_CPU_SHARE)
            or (slow_ratio or 0.0) > self.MAX_SLOW_RATIO,
        }
