from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.interface.schedules import Schedule

SHAPES = ("constant", "linear", "power", "cosine", "wsd")


@given(
    st.sampled_from(SHAPES),
    st.floats(0, 0.5),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0.01, 0.5),
    st.integers(1, 500),
)
def test_factors_stay_in_bounds_rise_then_fall(
    shape: str, warmup: float, horizon: float, final: float, decay: float, total: int
) -> None:
    schedule = Schedule(
        shape=shape, warmup_fraction=warmup, horizon_fraction=horizon, final_fraction=final, decay_fraction=decay
    )
    factors = [schedule.factor(step, total) for step in range(total)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    peak = next((s for s in range(total) if s >= warmup * horizon * total), total)
    assert all(a <= b + 1e-12 for a, b in pairwise(factors[:peak]))
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[peak:]))
    after = [f for step, f in enumerate(factors) if step >= max(horizon, warmup * horizon) * total]
    assert all(factor == (1.0 if shape == "constant" else final) for factor in after)


def test_values_by_hand() -> None:
    linear = Schedule(shape="linear", warmup_fraction=0.1, horizon_fraction=0.5)
    assert [linear.factor(step, 200) for step in (0, 4, 9, 10, 55, 100, 150)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    )
    cosine = Schedule(shape="cosine", warmup_fraction=0, horizon_fraction=1, final_fraction=0.2)
    assert [cosine.factor(step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    wsd = Schedule(shape="wsd", warmup_fraction=0.1, horizon_fraction=1, decay_fraction=0.2)
    assert [wsd.factor(step, 100) for step in (50, 80, 90)] == pytest.approx([1.0, 1.0, 0.5])


def test_step_decay_and_restarts_by_hand() -> None:
    step = Schedule(shape="step", warmup_fraction=0.2, horizon_fraction=1)
    assert [step.factor(s, 100) for s in (20, 39, 40, 60, 99)] == [1.0, 1.0, 1 / 4, 1 / 16, 1 / 64]
    restarts = Schedule(shape="restarts", warmup_fraction=0, horizon_fraction=0.7, cycles=3)  # of 10, 20 and 40 steps
    factors = [restarts.factor(s, 100) for s in (0, 5, 10, 20, 30, 50, 70, 90)]
    assert factors == pytest.approx([1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 0.0, 0.0])


def test_options_of_other_shapes_are_not_recorded() -> None:
    linear = Schedule(shape="linear", warmup_fraction=0, horizon_fraction=1)
    assert "cycles" not in linear.model_dump() and "step_factor" not in linear.model_dump()
    assert Schedule(shape="restarts", warmup_fraction=0, horizon_fraction=1).model_dump()["cycles"] == 3


def test_powers_and_tails_by_hand() -> None:
    power = Schedule(shape="power", warmup_fraction=0.2, horizon_fraction=1, power=2, final_fraction=0.1)
    assert [power.factor(s, 100) for s in (20, 60, 100)] == pytest.approx([1.0, 0.1 + 0.9 * 0.25, 0.1])
    options = {"shape": "wsd", "warmup_fraction": 0.1, "horizon_fraction": 1, "decay_fraction": 0.4}
    sqrt = Schedule(**options, tail="sqrt")
    assert [sqrt.factor(s, 100) for s in (60, 70, 84)] == pytest.approx([1.0, 0.5, 1 - 0.6**0.5])
    tail = Schedule(**options, tail="power", power=3)
    assert [tail.factor(s, 100) for s in (60, 80)] == pytest.approx([1.0, 0.125])
    apart = Schedule(**options, rest_decay_fraction=0.8)
    assert [apart.factor(s, 100) for s in (20, 60, 80)] == pytest.approx([1.0, 1.0, 0.5])
    assert [apart.factor(s, 100, "rest") for s in (20, 60, 80)] == pytest.approx([1.0, 0.5, 0.25])


def test_options_at_their_defaults_leave_records_as_they_were() -> None:
    """They came after the first records, whose identity does not have them."""
    new = {"tail", "power", "rest_decay_fraction", "scale_weight_decay"}
    assert not new & Schedule(shape="wsd", warmup_fraction=0, horizon_fraction=1).model_dump().keys()
    chosen = Schedule(
        shape="wsd", warmup_fraction=0, horizon_fraction=1, tail="power", power=2, scale_weight_decay=True
    )
    assert chosen.model_dump().keys() & new == {"tail", "power", "scale_weight_decay"}
    assert Schedule(**chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shape": "linear", "tail": "sqrt"}, "tail=sqrt has no effect with shape=linear; it belongs to shape=wsd"),
        ({"shape": "wsd", "power": 2.0}, "power=2.0 has no effect with shape=wsd; it belongs to shape=power or"),
        ({"shape": "cosine", "rest_decay_fraction": 0.5}, "rest_decay_fraction=0.5 has no effect with shape=cosine"),
        ({"shape": "wsd", "rest_decay_fraction": 0.95}, "rest_decay_fraction=0.95 add up to more than 1"),
    ],
)
def test_an_option_without_an_effect_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(expected)):
        Schedule(warmup_fraction=0.1, horizon_fraction=1, **options)


def test_wsd_phases_must_fit() -> None:
    with pytest.raises(ValidationError, match="more than 1"):
        Schedule(shape="wsd", warmup_fraction=0.9, horizon_fraction=1, decay_fraction=0.2)
