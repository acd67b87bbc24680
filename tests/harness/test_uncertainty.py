"""The intervals say 95%: simulated leaderboards with a known truth, misses included, count whether that is so."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

from harness.scoring import benchmark_scores
from harness.uncertainty import Uncertainty, estimate

SIGMA = 0.06
BUDGET = 10.0
NEAR = np.log(BUDGET) - 0.84 * SIGMA  # a study misses with probability 0.2
NEVER = np.log(BUDGET) + 20 * SIGMA

# Two submissions without any difference, the other two apart by half a standard error and more; the last workload is
# near its budget for two submissions, and the last submission never meets the target of the third.
EASY = np.log([3.0, 4.0, 2.5, NEAR])
EASY[3] = NEAR - 0.3
MIXED = EASY + np.array([0.0, 0.0, 0.04, 0.2])[:, None] + np.array([[0], [0], [0], [1]]) * [0.0, 0.3, 0.0, -0.3]
MIXED[0, 3] = MIXED[2, 3] = NEAR
MIXED[3, 2] = NEVER

# No difference between any; one workload near its budget, one that nobody meets.
EQUAL = np.tile(np.append(np.log([3.0, 4.0, 2.5]), [NEAR, NEVER]), (4, 1))


def _studies(log_times: np.ndarray, *, resolution: float = 0.0) -> pd.DataFrame:
    """Log times [submissions, workloads, studies] as the table that `estimate` reads; missed beyond BUDGET."""
    s, w, k = (index.ravel() for index in np.indices(log_times.shape))
    times = np.exp(log_times).ravel()
    met = times <= BUDGET
    return pd.DataFrame(
        {
            "submission": np.array([f"s{i}" for i in range(log_times.shape[0])])[s],
            "workload": np.array([f"w{i}" for i in range(log_times.shape[1])])[w],
            "study": k,
            "time": np.where(met, times, np.inf),
            "limit": np.where(met, times, BUDGET),  # training stops at the target
            "resolution": np.where(met, resolution * times, np.nan),
            "budget": BUDGET,
        }
    )


@dataclass
class _Coverage:
    """Hits of the intervals over replications, and how often a comparison of equals was called a difference."""

    times: list[np.ndarray] = field(default_factory=list)
    times_near: list[np.ndarray] = field(default_factory=list)
    speedups: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    alarms: list[np.ndarray] = field(default_factory=list)
    family_alarms: list[np.ndarray] = field(default_factory=list)
    details: list[Uncertainty] = field(default_factory=list)

    def rate(self, name: str) -> float:
        return float(np.concatenate(getattr(self, name)).mean())


def _simulate(log_medians: np.ndarray, studies: int, replications: int, *, correlation: float = 0.0) -> _Coverage:
    rng = np.random.default_rng([studies, replications])
    coverage = _Coverage()
    shape = (*log_medians.shape, studies)
    limit = np.log(BUDGET)
    # A cell that always misses has its interval open to infinity: no test of coverage.
    open_to_test = log_medians < limit + 3 * SIGMA
    shared = open_to_test & open_to_test[0]
    truth = np.exp(log_medians)
    true_scores = benchmark_scores(np.where(log_medians <= limit, truth, np.inf))
    true_speedups = np.exp(((log_medians[0] - log_medians) * shared).sum(axis=1) / shared.sum(axis=1))
    equal = [(a, b) for a in range(shape[0]) for b in range(a) if (log_medians[a] == log_medians[b]).all()]
    for replication in range(replications):
        noise = np.sqrt(1 - correlation) * rng.standard_normal(shape)
        noise += np.sqrt(correlation) * rng.standard_normal((1, *shape[1:]))
        found = estimate(_studies(log_medians[..., None] + SIGMA * noise), baseline="s0", seed=replication)
        low, high = (found.times[end].to_numpy().reshape(truth.shape) for end in ("low", "high"))
        covered = (low <= truth) & (truth <= high)
        coverage.times.append(covered[open_to_test])
        coverage.times_near.append(covered[log_medians == NEAR])
        low, high = found.speedups["low"].to_numpy()[1:], found.speedups["high"].to_numpy()[1:]
        coverage.speedups.append(((low <= true_speedups[1:]) & (true_speedups[1:] <= high))[~np.isnan(low)])
        low, high = found.scores["low"].to_numpy(), found.scores["high"].to_numpy()
        coverage.scores.append((low - 1e-12 <= true_scores) & (true_scores <= high + 1e-12))
        rows = found.pairs.set_index(["b", "a"])
        tested = rows.loc[[(f"s{a}", f"s{b}") for a, b in equal]]
        coverage.alarms.append(tested["p"].to_numpy() <= 0.05)
        coverage.family_alarms.append(np.array([tested["verdict"].isin(["a faster", "b faster"]).any()]))
        coverage.details.append(found)
    return coverage


REPLICATIONS = {3: 300, 5: 300, 10: 200}
SIMULATED = list(REPLICATIONS)


@pytest.fixture(scope="module")
def mixed() -> dict[int, _Coverage]:
    return {studies: _simulate(MIXED, studies, REPLICATIONS[studies]) for studies in SIMULATED}


@pytest.fixture(scope="module")
def equal() -> dict[int, _Coverage]:
    return {studies: _simulate(EQUAL, studies, REPLICATIONS[studies]) for studies in SIMULATED}


@pytest.mark.parametrize("studies", SIMULATED)
def test_intervals_cover_the_truth_as_often_as_they_say(mixed: dict[int, _Coverage], studies: int) -> None:
    found = mixed[studies]
    print(studies, {name: found.rate(name) for name in ("times", "times_near", "speedups", "scores")})
    assert 0.93 <= found.rate("times") <= 0.97
    assert 0.93 <= found.rate("speedups") <= 0.97
    # A score has ends, at 0, at 1 and where a target may just not have been met, where an interval covers always.
    assert found.rate("scores") >= 0.93


@pytest.mark.parametrize("studies", SIMULATED)
def test_equals_are_called_different_in_at_most_one_of_twenty(equal: dict[int, _Coverage], studies: int) -> None:
    print(studies, {name: equal[studies].rate(name) for name in ("alarms", "family_alarms")})
    assert equal[studies].rate("alarms") <= 0.057
    assert equal[studies].rate("family_alarms") <= 0.075


def test_a_bootstrap_of_three_medians_would_not_pass() -> None:
    """The negative control: what the t model replaces covers far less often than it says."""
    rng = np.random.default_rng(3)
    samples = rng.standard_normal((4000, 3))
    resampled = np.median(samples[:, rng.integers(0, 3, (500, 3))], axis=2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.8


def test_twice_the_detectable_difference_is_nearly_always_found() -> None:
    detectable = np.log(_simulate(EQUAL[:2, :3], 3, 30).details[0].detectable)
    apart = EQUAL[:2, :3] + np.array([[0.0], [2 * detectable]])
    verdicts = [found.pairs["verdict"].iloc[0] for found in _simulate(apart, 3, 100).details]
    assert np.mean([verdict == "a faster" for verdict in verdicts]) >= 0.95


@pytest.mark.parametrize("studies", [1, 2])
def test_a_single_study_has_no_interval_and_says_so(studies: int) -> None:
    rng = np.random.default_rng(0)
    found = estimate(_studies(MIXED[:2, :2, None] + SIGMA * rng.standard_normal((2, 2, studies))), baseline="s0")
    if studies == 1:
        assert "single study" in found.method
        assert found.times[["low", "high"]].isna().all(axis=None) and np.isnan(found.detectable)
        assert set(found.pairs["verdict"]) == {"no verdict"}
    assert found.pairs.shape[0] == 1


def test_order_names_and_units_change_nothing() -> None:
    rng = np.random.default_rng(1)
    studies = _studies(MIXED[..., None] + SIGMA * rng.standard_normal((*MIXED.shape, 3)), resolution=0.02)
    plain = estimate(studies, baseline="s0")
    renamed = studies.assign(submission=studies["submission"].map({f"s{i}": f"z{9 - i}" for i in range(4)}))
    renamed[["time", "limit", "resolution", "budget"]] *= 60.0
    other = estimate(renamed.sample(frac=1, random_state=1), baseline="z9")
    for name in ("scores", "speedups", "ranks"):
        back = getattr(other, name).rename(index={f"z{9 - i}": f"s{i}" for i in range(4)}).sort_index()
        np.testing.assert_allclose(getattr(plain, name).to_numpy(float), back.to_numpy(float), rtol=1e-9)
    assert sorted(plain.pairs["p"].dropna().round(9)) == sorted(other.pairs["p"].dropna().round(9))


def test_differences_within_the_resolution_are_no_differences() -> None:
    same = np.log([[3.0, 4.0], [3.03, 4.04]])[..., None] + np.zeros(4)
    assert set(estimate(_studies(same, resolution=0.05), baseline="s0").pairs["verdict"]) == {"no difference shown"}


@pytest.mark.parametrize("shape", [(0, 0, 0), (1, 1, 1), (1, 3, 5), (3, 1, 3)])
@pytest.mark.parametrize("offset", [0.0, 9.0])
def test_odd_tables_are_no_crash(shape: tuple[int, int, int], offset: float) -> None:
    estimate(_studies(np.random.default_rng(0).normal(offset, 0.1, shape)), baseline=None)
