from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch

from harness.interface.schedules import Schedule
from harness.trial import conformance
from harness.trial.refined_schedule import gradient_norms, refine_schedule


def test_equal_norms_give_linear_decay() -> None:
    factors = refine_schedule([3.0] * 100, "sgd", points=100)
    assert factors == pytest.approx([(99 - k) / 99 for k in range(100)], abs=1e-4)


@pytest.mark.parametrize(("kind", "power"), [("sgd", 2), ("adam", 1)])
def test_large_norms_at_first_give_a_warm_up(kind: Any, power: int) -> None:
    """Against Algorithm 1 step by step, without smoothing."""
    norms = [5.0, 4.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    weights = [1 / g**power for g in norms]
    expected = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
    factors = refine_schedule(norms, kind, smoothing=0.01, points=10)
    assert factors == pytest.approx([x / max(expected) for x in expected], abs=1e-4)
    assert factors[0] < 0.5 and factors[-1] == 0


def test_the_median_removes_spikes() -> None:
    """The norms are continued by the first one before the run, and mirrored after it."""
    torch.manual_seed(0)
    norms = (1 + torch.rand(200)).tolist()
    norms[50::17] = [50.0] * len(norms[50::17])
    continued = [norms[0]] * 10 + norms + norms[-2:-12:-1]
    smooth = [median(continued[t : t + 21]) for t in range(200)]
    assert max(smooth) < 2
    weights = [g**-2 for g in smooth]
    rate = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
    assert refine_schedule(norms, "sgd", points=200) == pytest.approx([x / max(rate) for x in rate], abs=1e-4)


def test_norms_of_a_diverged_run_are_refused() -> None:
    with pytest.raises(ValueError, match="did the run diverge"):
        refine_schedule([1.0, float("nan")], "adam")


def test_norms_are_those_before_clipping() -> None:
    arguments = ["optimizer.class_path=torch.optim.SGD", "optimizer.hyperparameters.lr=0.1"]
    free = conformance.make_subject("any", *arguments).build()
    clipped = conformance.make_subject("any", *arguments, "optimizer.clip_norm=0.001").build()
    norms, small = (gradient_norms(training, "sgd") for training in (free, clipped))
    assert len(norms) == len(small) == conformance.STEPS
    assert norms[0] == pytest.approx(small[0]) and small[0] > 0.01
    l1 = gradient_norms(conformance.make_subject("any", *arguments).build(), "adam")
    assert l1[0] > norms[0]


def test_a_table_is_read_between_warm_up_and_horizon() -> None:
    schedule = Schedule(shape="table", warmup_fraction=0.1, horizon_fraction=0.5, table=(0.5, 1.0, 0.25))
    assert [schedule.factor(step, 200) for step in (10, 55, 100, 150)] == pytest.approx([0.5, 1.0, 0.0, 0.0])
    assert schedule.factor(32.5, 200) == pytest.approx(0.75)
    assert (
        "table" in schedule.model_dump()
        and "table" not in Schedule(shape="linear", warmup_fraction=0, horizon_fraction=1).model_dump()
    )


@pytest.mark.parametrize(("shape", "table"), [("table", ()), ("table", (1.0,)), ("linear", (1.0, 0.0))])
def test_a_table_and_its_shape_belong_together(shape: Any, table: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"shape={shape} with a table of {len(table)} factors"):
        Schedule(shape=shape, warmup_fraction=0, horizon_fraction=1, table=table)
