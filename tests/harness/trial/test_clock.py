from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from harness.trial.clock import Clock, DataWait, Disturbance, Elapsed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on a time that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)
    monkeypatch.setattr("harness.trial.clock.make_meter", lambda device: None)
    clock = Clock(CPU)
    clock.now = now  # type: ignore[attr-defined]
    return clock


def test_what_is_on_the_clock(clock: Clock) -> None:
    now = clock.now  # type: ignore[attr-defined]
    with clock.submission("build"):
        now[0] += 1
    with clock.submission():
        now[0] += 10
        with clock.data_wait():
            now[0] += 3
    with clock.off("evaluation"):
        now[0] += 100
    with clock.submission("averaging"):
        now[0] += 0.5
    state = clock.state_dict()
    assert state == {
        "submission": 14.5, "build": 1, "data_wait": 3, "compile": 0, "averaging": 0.5, "cpu": 7.25, "evaluation": 100,
        "logging": 0, "energy": None, "total": 114.5,
    }  # fmt: skip


class Timeline:
    """A host that gives work to a GPU and runs ahead of it, both in seconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds

    def make_event(self, enable_timing: bool) -> Any:
        timeline = self

        class Event:
            def record(self, stream: object) -> None:
                self.seconds = max(timeline.device, timeline.host)

            def elapsed_time(self, end: Any) -> float:
                return 1000 * (end.seconds - self.seconds)

        return Event()


def test_data_waiting_on_a_gpu_is_how_long_the_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    monkeypatch.setattr(torch.cuda, "Event", timeline.make_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    waiting = DataWait(torch.device("cuda", 0))

    def train(steps: int, *, reading: float, copying: float = 0.0, training: float = 10.0) -> float:
        for _ in range(steps):
            waiting.begin()
            timeline.host += reading
            timeline.launch(copying)
            waiting.end()
            timeline.launch(training)
        # The synchronisation at the end of a segment.
        timeline.host = timeline.device = max(timeline.host, timeline.device)
        return waiting.take_seconds()

    # The first batch of a segment is waited for. The others are read while the GPU is busy with the step before.
    assert train(5, reading=4.0) == pytest.approx(4)
    # The copy is work that the GPU does before it can train.
    assert train(5, reading=4.0, copying=0.5) == pytest.approx(4 + 5 * 0.5)
    # Reading takes longer than a step: the GPU is idle for the difference.
    assert train(5, reading=12.0) == pytest.approx(12 + 4 * 2)


def test_compiling_the_model_is_charged_to_nobody(clock: Clock) -> None:
    now = clock.now  # type: ignore[attr-defined]
    compiled = clock._compile

    def compile_for(seconds: float) -> None:
        now[0] += seconds
        compiled._total += seconds

    with clock.submission():
        now[0] += 1
        compile_for(5)
        with clock.model_compilation():
            compile_for(20)
            now[0] += 2
    assert (clock.elapsed.submission, clock.elapsed.compile) == (8, 5)
    with clock.submission(charge_compile=False):
        compile_for(5)
        with clock.model_compilation():
            compile_for(20)
        now[0] += 1
    assert (clock.elapsed.submission, clock.elapsed.compile) == (9, 5)


def test_a_resumed_clock_goes_on_from_its_checkpoint(clock: Clock) -> None:
    now = clock.now  # type: ignore[attr-defined]
    with clock.submission():
        now[0] += 2
    state = clock.state_dict()
    now[0] += 1000  # killed, and continued later
    clock.load_state_dict(state)
    with clock.submission():
        now[0] += 3
    clock.tick()
    assert (clock.elapsed.submission, clock.elapsed.total) == (5, 5)


def test_compiling_again_after_a_resume_is_not_charged(clock: Clock) -> None:
    now = clock.now  # type: ignore[attr-defined]

    def compile_for(seconds: float) -> None:
        clock._compile._on_start(None)
        now[0] += seconds
        clock._compile._on_end(None)

    with clock.submission():
        compile_for(4)
        now[0] += 1
    assert (clock.elapsed.submission, clock.elapsed.compile) == (5, 4)
    with clock.submission(charge_compile=False):
        compile_for(4)
        now[0] += 1
    assert (clock.elapsed.submission, clock.elapsed.compile) == (6, 4)


def test_an_exception_still_counts_the_time(clock: Clock) -> None:
    with pytest.raises(RuntimeError), clock.submission():
        clock.now[0] += 2  # type: ignore[attr-defined]
        raise RuntimeError
    assert clock.elapsed.submission == 2


def test_disturbance() -> None:
    quiet = Disturbance()
    for _ in range(20):
        quiet.add_segment(1.0, 10)
    assert not quiet.summary(Elapsed(submission=20, cpu=19.9), CPU)["disturbed"]
    assert quiet.summary(Elapsed(submission=20, cpu=15), CPU)["disturbed"]
    noisy = Disturbance()
    for k in range(20):
        noisy.add_segment(2.0 if k % 5 == 0 else 1.0, 10)
    assert noisy.summary(Elapsed(submission=20, cpu=19.9), CPU)["disturbed"]
