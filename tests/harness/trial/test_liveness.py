"""Signs of progress: what the process that watches a trial hears of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from harness.trial import liveness
from harness.trial.record import Record
from tests.conftest import TINY_RESNET


class Signs:
    """The reading end of the pipe."""

    def __init__(self) -> None:
        self.receiver, self.sender = os.pipe()
        os.set_blocking(self.receiver, False)

    def count(self) -> int:
        """Signs since the last call."""
        try:
            return len(os.read(self.receiver, 1 << 16))
        except BlockingIOError:
            return 0


@pytest.fixture
def signs() -> Iterator[Signs]:
    signs = Signs()
    liveness.send_progress_to(signs.sender)
    yield signs
    liveness.send_progress_to(None)
    os.close(signs.receiver)
    os.close(signs.sender)


def test_every_step_and_every_evaluated_batch_is_progress(
    trial: Callable[..., Record], signs: Signs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "INTERVAL_SECONDS", 0.0)
    counts = []
    # 12 steps; 4 evaluations of the validation split and one of the test split, in 2 and in 4 batches each.
    for steps in (12, 24):
        trial(f"workload.max_steps={steps}", f"label=steps-{steps}")
        counts.append(signs.count())
    assert counts[1] - counts[0] == 12 + 4 * 2
    trial("label=small", "workload.data={blocks: 200, evaluation_examples: 16, evaluation_batch: 4}")
    assert signs.count() - counts[0] == 5 * 2


def test_statistics_that_are_recomputed_are_progress(
    trial: Callable[..., Record], signs: Signs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "INTERVAL_SECONDS", 0.0)
    counts = []
    for optimizer in ("sgd", "swa"):
        trial(base=TINY_RESNET, optimizer=optimizer)
        counts.append(signs.count())
    assert counts[1] > counts[0]


def test_signs_are_rare_and_a_pipe_that_nobody_reads_stops_nothing(
    signs: Signs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "monotonic", lambda: 1.0)
    for _ in range(3):
        liveness.show_progress()
    assert signs.count() == 1
    monkeypatch.setattr(liveness, "INTERVAL_SECONDS", 0.0)
    liveness.send_progress_to(signs.sender)
    for _ in range(100_000):
        liveness.show_progress()
    assert signs.count() == 1 << 16
    liveness.send_progress_to(None)
    liveness.show_progress()
    assert signs.count() == 0
