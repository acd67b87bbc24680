"""Stopping policies on curves that are written down here, and what must hold for any."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.study import pruning_rules
from harness.study.pruning_replay import replay_study
from harness.study.pruning_rules import Curve, Futility, References

Distances = list[float]


def curve(
    distances: Distances, seconds: float = 1.0, steps: float = 10.0, budget: float = 100.0, name: str = "a"
) -> Curve:
    """An evaluation every `steps` steps and `seconds` seconds; the budget is in steps."""
    count = np.arange(1.0, len(distances) + 1)
    return Curve.from_columns(
        name, seconds * count, steps * count, steps * count / budget, np.array(distances, dtype=float)
    )


def references(*trials: Curve, studies: int = 1) -> References:
    return References.from_trials(
        (f"other{i}", study, trial) for i, trial in enumerate(trials) for study in range(studies)
    )


LENIENT = Futility(margin=1.0, earliest=0.0, trials=1, submissions=1)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    n = draw(st.integers(1, 8))
    gaps = st.lists(st.integers(0, 3), min_size=n, max_size=n)  # clocks may stand still between two evaluations
    seconds, steps = (np.cumsum(draw(gaps)).astype(float) + 1 for _ in range(2))
    steps = np.arange(n) + steps
    values = st.one_of(st.floats(-0.2, 2), st.just(float("nan")))
    distance = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    return Curve.from_columns("any", seconds, steps, steps / 40, distance)


studies = st.lists(curves(), min_size=1, max_size=5)


def best(trials: list[Curve], ends: list[int]) -> tuple[float, float]:
    """The smallest seconds and steps to target that the first `ends` evaluations show."""
    seen = [(c.seconds[c.reached], c.steps[c.reached]) for c, end in zip(trials, ends, strict=True) if c.reached < end]
    return min((s for s, _ in seen), default=np.inf), min((s for _, s in seen), default=np.inf)


@given(studies, st.integers(1, 5))
def test_exact_never_changes_the_best_of_a_study_by_time_or_by_steps(trials: list[Curve], parallel: int) -> None:
    ends = replay_study("exact", trials, parallel=parallel)
    assert best(trials, ends) == best(trials, [len(c.seconds) for c in trials])


@given(curves(), studies, studies, st.integers(0, 8))
def test_a_verdict_depends_on_nothing_that_came_later(
    trial: Curve, siblings: list[Curve], others: list[Curve], count: int
) -> None:
    look_at = references(*others)
    for policy in ("none", "exact", "futility"):
        of_all = pruning_rules.stops(policy, trial, siblings, look_at, LENIENT)
        part = trial.until(count)
        np.testing.assert_array_equal(pruning_rules.stops(policy, part, siblings, look_at, LENIENT), of_all[:count])
        reason = pruning_rules.stop_reason(policy, part, siblings, look_at, LENIENT)
        assert (reason is not None) == bool(len(part.seconds) and of_all[: len(part.seconds)][-1])
        assert not of_all[trial.reached :].any()


@given(curves(), studies, studies)
def test_futility_stops_whatever_exact_stops_and_a_larger_margin_stops_less(
    trial: Curve, siblings: list[Curve], others: list[Curve]
) -> None:
    exact = pruning_rules.stops("exact", trial, siblings)
    loose, strict = (
        pruning_rules.stops("futility", trial, siblings, references(*others), Futility(m, 0.0, 1, 1))
        for m in (2.0, 1.0)
    )
    assert not (exact & ~loose).any() and not (loose & ~strict).any()


def test_exact_waits_until_both_clocks_are_past_the_sibling() -> None:
    sibling = curve([1, 1, 0], name="trial 1")
    slower_steps = curve([1] * 8, seconds=0.5)
    assert pruning_rules.stops("exact", slower_steps, [sibling]).tolist() == [False] * 5 + [True] * 3
    reason = pruning_rules.stop_reason("exact", slower_steps, [sibling])
    expected = "trial 1 met the target after 30 steps and 3.0 s, this trial has not after 80 and 4.0"
    assert reason == f"pruning=exact: {expected}"
    assert not pruning_rules.stops("exact", slower_steps, [curve([1] * 8)]).any()
    assert not pruning_rules.stops("none", slower_steps, [sibling]).any()


def test_exact_spares_what_can_be_one_of_the_best_that_are_kept() -> None:
    siblings = [curve([1, 0], name="first"), curve([1, 1, 0], name="second"), curve([1, 1, 1, 1, 0], name="third")]
    trial = curve([1, 1, 1, 1, 1, 1])
    first_stop = [int(np.argmax(pruning_rules.stops("exact", trial, siblings, kept=kept))) + 1 for kept in (1, 2, 3)]
    assert first_stop == [2, 3, 5]
    assert not pruning_rules.stops("exact", trial, siblings, kept=4).any()
    assert pruning_rules.stop_reason("exact", trial.until(2), siblings, kept=2) is None
    assert "first met the target" in str(pruning_rules.stop_reason("exact", trial.until(3), siblings, kept=2))


def test_futility_compares_at_the_same_share_of_the_way() -> None:
    """Twice as fast a reference: at half the steps it was as far from its target as the trial from its deadline."""
    reference = curve([8, 6, 4, 2, 0])
    look_at = references(reference)
    rule = Futility(margin=1.0, earliest=0.0, trials=1, submissions=1)
    on_course = curve([9, 9, 8, 8, 6, 6, 4, 4, 2, 2])
    # Tolerated are 1 - share / 2 of the reference's distance, and before its first evaluation anything.
    assert pruning_rules.stops("futility", on_course, [], look_at, rule).tolist() == [False] + [True] * 9
    closer = curve([v / 4 for v in (9, 9, 8, 8, 6, 6, 4, 4, 2, 2)])
    assert not pruning_rules.stops("futility", closer, [], look_at, rule)[:-1].any()
    reason = pruning_rules.stop_reason("futility", on_course, [], look_at, rule)
    assert reason is not None and "the 1 successful trials of 1 other submissions" in reason


def test_futility_needs_enough_references() -> None:
    hopeless = curve([100.0] * 9)
    table = references(curve([3, 2, 1, 0]), studies=12)
    two = references(curve([3, 2, 1, 0]), curve([3, 2, 1, 0]), studies=12)
    assert (table.trials, table.submissions, two.trials, two.submissions) == (12, 1, 24, 2)
    assert not pruning_rules.stops("futility", hopeless, [], table).any()
    assert pruning_rules.stops("futility", hopeless, [], two).tolist() == [False] * 2 + [True] * 7
    assert not pruning_rules.stops("futility", hopeless, [], pruning_rules.NO_REFERENCES).any()


def test_futility_stops_what_is_too_slow_to_score_by_steps_and_by_seconds() -> None:
    look_at = references(curve([1, 0]), curve([1, 1, 0]), curve([1, 1, 1]))  # 20 and 30 steps, and a miss
    assert (look_at.fastest_progress, look_at.fastest_seconds) == (0.2, 2.0)
    assert pruning_rules.stops("futility", curve([0.1] * 10), [], look_at).tolist() == [False] * 7 + [True] * 3
    reason = pruning_rules.stop_reason("futility", curve([0.1] * 10), [], look_at)
    assert reason is not None and "4 times the time-to-target of the fastest" in reason
    cheap = curve([0.1] * 10, seconds=0.5)  # many steps that cost little
    assert not pruning_rules.stops("futility", cheap, [], look_at).any()


def test_the_fastest_is_a_median_over_studies() -> None:
    quick, slow, missed = curve([1, 0]), curve([1, 1, 1, 0]), curve([1, 1])
    table = References.from_trials([("a", 0, quick), ("a", 1, slow), ("a", 2, slow), ("b", 0, quick), ("b", 1, missed)])
    assert table.fastest_progress == 0.4
    assert References.from_trials([("b", 0, missed)]).fastest_progress == np.inf


def test_rows_that_cannot_be_used_are_stepped_over() -> None:
    raw = Curve.from_columns(
        "a", *(np.array(a) for a in ([1, np.nan, 3.0], [1.0, 2, 3], [0.1, 0.2, 0.3], [np.nan, 0.0, 1.0]))
    )
    assert raw.seconds.tolist() == [1, 3] and raw.distance.tolist() == [np.inf, 1] and not raw.has_reached
