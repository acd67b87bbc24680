"""What is said before a study starts and of its tuning: the power, and the luck of the points."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from harness.config.confirmation import FRESH_SEED, TUNING_SEED
from harness.scoring.power import (
    WorkloadNoise,
    budget_interval,
    detectable_difference,
    seeds_needed,
    tuning_luck,
    workload_noise,
)
from harness.scoring.uncertainty import estimate
from tests.harness.folders import pacemark_trial
from tests.harness.scoring.simulated import SIGMA, TIED, noisy, studies_table
from tests.processes import call

NOISES = [WorkloadNoise(SIGMA, 0.02)] * 3


def test_the_power_that_is_said_is_that_of_the_verdicts() -> None:
    """Four of five, of 150 tables."""
    ratio = detectable_difference(NOISES, 5)
    log_medians = TIED[:2] + np.array([[0.0], [np.log(ratio)]])
    tables = [studies_table(noisy(log_medians, 5, seed), resolution=0.02) for seed in range(150)]
    pairs = [estimate(table.assign(interpolated=True), baseline=None, draws=2).pairs for table in tables]
    assert 0.7 <= np.mean([pair["verdict"].iloc[0] == "a faster" for pair in pairs]) <= 0.9
    # A board says the same of its own.
    detectable = [estimate(table.assign(interpolated=True), baseline=None, draws=2).detectable for table in tables[:20]]
    assert np.log(np.median(detectable)) == pytest.approx(np.log(ratio), rel=0.1)


def test_seeds_needed_are_the_fewest_that_find_it() -> None:
    needed = seeds_needed(NOISES, 1.05)
    assert needed is not None
    assert detectable_difference(NOISES, needed) <= 1.05 < detectable_difference(NOISES, needed - 1)
    # The error of the crossings stays, however many seeds there are.
    assert seeds_needed(NOISES, 1.01) is None


def test_noise_is_that_of_the_provenance_or_the_usual() -> None:
    measured = workload_noise({"coefficient_of_variation": 0.03, "steps_to_target": [100, None, 300]}, 10, 1000)
    assert (measured.sigma, measured.spacing) == (0.03, pytest.approx(0.05))
    assert workload_noise(None, 10, 1000) == WorkloadNoise(0.05, 0.01)


def test_the_luck_of_a_tuning_is_that_of_points_drawn_again() -> None:
    """All 4^4 ways to draw four points with replacement."""
    times = np.array([3.0, np.inf, 2.0, 2.5])
    luck = tuning_luck(times)
    best = np.array([min(drawn) for drawn in product(times, repeat=4)]) / 2.0
    for factor, weight in zip(luck.factors, luck.weights, strict=True):
        assert weight == pytest.approx(np.mean(best == factor))
    assert luck.missed == pytest.approx((1 / 4) ** 4)
    assert luck.expected == pytest.approx(np.exp(np.log(best[np.isfinite(best)]).mean()))
    assert luck.quantile(0.5) == 1.0 and luck.quantile(1.0) == np.inf


def test_a_budget_of_tuning_is_known_less_well_than_its_settings() -> None:
    alone = budget_interval(90.0, 110.0, tuning_luck(np.array([5.0])))
    assert alone == pytest.approx((90.0, 110.0), rel=1e-6)
    low, high = budget_interval(90.0, 110.0, tuning_luck(np.array([5.0, 5.5, 6.0, 7.0])))
    assert 90 < low < 95 and high > 115
    # Half of the points miss: all of two do in a quarter of the draws.
    assert budget_interval(90.0, 110.0, tuning_luck(np.array([5.0, np.inf])))[1] == np.inf
    assert budget_interval(90.0, np.inf, tuning_luck(np.array([5.0]))) == (90.0, np.inf)


@pytest.mark.usefixtures("workloads_of_tests")
def test_both_questions_have_an_answer(tmp_path: Path) -> None:
    fresh, tuning = tmp_path / "fresh", tmp_path / "tuning"
    for i in range(8):
        parts = {"study": FRESH_SEED + i, "trial": 3, "ruleset": "confirmed"}
        pacemark_trial(fresh, [3.0, 1.5 + 0.02 * i], 10.0 + 0.1 * i, **parts)  # type: ignore[arg-type]
    for trial in range(1, 11):
        values = [3.0, 2.5, 1.5 + 0.02 * trial] if trial % 2 else [3.0, 2.5, 2.2]
        parts = {"study": TUNING_SEED, "trial": trial, "ruleset": "confirmed_tuning"}
        pacemark_trial(tuning, values, 10.0 + 0.1 * trial, **parts)  # type: ignore[arg-type]
    both = call("confirm", "results", fresh, tuning)
    assert both.returncode == 0, both.stderr
    # Crossings from 100 + 100 / 1.5 to 100 + 100 / 1.36 steps.
    assert "a on lm: these settings 170 (1" in both.stdout and "8 of 8 fresh seeds" in both.stdout
    assert "luck of tuning: the best of 10 points" in both.stdout and "meets no target in 0.1%" in both.stdout
    assert "this budget of tuning 17" in both.stdout
    # The score needs no record of the tuning.
    alone = call("confirm", "results", fresh)
    assert alone.returncode == 0 and "not known, as its records" in alone.stdout
    assert alone.stdout.splitlines()[:3] == both.stdout.splitlines()[:3]


def test_power_is_printed() -> None:
    done = call("confirm", "power", "--difference", "5")
    assert done.returncode == 0 and "needs 5 seeds" in done.stdout, done.stderr
    done = call("confirm", "power", "--seeds", "8")
    assert "8 seeds will find differences of 3.6% or more" in done.stdout
    for arguments in (
        ["power", "--difference", "-1"],
        ["power", "--seeds", "1"],
        ["results", ".", "--ruleset", "quick"],
    ):
        done = call("confirm", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: --"), done.stderr
