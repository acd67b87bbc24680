"""Single tables of studies: what `estimate` makes of one study, of misses, of coarse evaluations, of odd input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.scoring.uncertainty import estimate
from tests.harness.scoring.simulated import BUDGET, LIMIT, MIXED, NEVER, TIED, noisy, studies_table


def test_without_misses_the_interval_is_the_pooled_t_interval() -> None:
    log_times = noisy(TIED, 3)
    uncertainty = estimate(studies_table(log_times), baseline="s0")
    pooled = np.sqrt(log_times.var(axis=-1, ddof=1).mean())
    assert uncertainty.dof == 24 and uncertainty.sigma == pytest.approx(pooled)
    half = 2.0638986 * pooled / np.sqrt(3)  # t with 24 degrees of freedom
    np.testing.assert_allclose(np.log(uncertainty.times["high"]), log_times.mean(axis=-1).ravel() + half)
    pair = uncertainty.pairs.iloc[0]
    difference = (log_times[0] - log_times[1]).mean()
    assert pair["log_ratio"] == pytest.approx(difference)
    assert pair["high"] == pytest.approx(difference + half * np.sqrt(2 / 3))


def test_one_study_has_no_interval_and_says_so() -> None:
    uncertainty = estimate(studies_table(noisy(MIXED[:2, :2], 1)), baseline="s0")
    assert "a single study" in uncertainty.method
    for frame in (uncertainty.times, uncertainty.scores, uncertainty.speedups):
        assert frame[["low", "high"]].isna().all(axis=None)
    assert np.isnan(uncertainty.detectable)
    assert list(uncertainty.pairs["verdict"]) == ["no verdict"] and "single study" in uncertainty.pairs["reason"][0]
    assert uncertainty.ranks.to_numpy().tolist() == [[1, 2], [1, 2]]


def test_two_studies_have_an_interval_if_there_are_enough_cells() -> None:
    assert np.isnan(estimate(studies_table(noisy(TIED[:1], 2)), baseline="s0").detectable)  # 3 degrees of freedom
    assert estimate(studies_table(noisy(TIED[:2], 2)), baseline="s0").times["high"].notna().all()


def test_misses_make_bounds_not_numbers() -> None:
    table = np.repeat(np.log([[3.0, 4.0, 2.5]]), 5, axis=0)
    table[1, 0] = NEVER  # and otherwise as fast
    table[2, :2] = [NEVER, np.log(2.0)]  # and far faster elsewhere
    table[3, 1] = NEVER
    table[4, :] = NEVER
    uncertainty = estimate(studies_table(noisy(table, 3)), baseline="s0")
    rows = uncertainty.pairs.set_index(["a", "b"])
    assert rows.loc[("s0", "s1"), "verdict"] == "a faster" and np.isneginf(rows.loc[("s0", "s1"), "low"])
    assert rows.loc[("s1", "s3"), "verdict"] == "no verdict"
    assert rows.loc[("s1", "s3"), "reason"] == "s1 missed w0; s3 missed w1"
    assert np.isnan(rows.loc[("s1", "s3"), "p"])
    # Both missed w0, which says nothing; on the rest the third is faster.
    assert rows.loc[("s1", "s2"), "verdict"] == "b faster" and np.isfinite(rows.loc[("s1", "s2"), "high"])
    per_workload = uncertainty.pairs_by_workload.set_index(["a", "b", "workload"])
    assert per_workload.loc[("s1", "s2", "w0"), "reason"] == "both missed the target"
    assert per_workload.loc[("s0", "s1", "w0"), "verdict"] == "a faster"
    assert per_workload.loc[("s0", "s1", "w1"), "verdict"] == "no difference shown"
    assert uncertainty.speedups.loc["s1", "low"] == 0 and np.isfinite(uncertainty.speedups.loc["s1", "high"])
    assert np.isinf(estimate(studies_table(noisy(table, 3)), baseline="s1").speedups.loc["s0", "high"])
    assert estimate(studies_table(noisy(table, 3)), baseline="s1").speedups.loc["s3"].isna().all()
    missed = uncertainty.times.set_index(["submission", "workload"]).loc[("s1", "w0")]
    assert np.isinf(missed["high"]) and 0.8 * BUDGET < missed["low"] < BUDGET
    assert uncertainty.ranks.loc["s0", "low"] == 1 and uncertainty.ranks.loc["s4", "high"] == 5


def test_a_miss_among_hits_leaves_the_time_open() -> None:
    log_times = noisy(TIED, 3)
    log_times[0, 0] = [np.log(9.9), np.log(9.8), NEVER]
    interval = estimate(studies_table(log_times), baseline="s0").times.iloc[0]
    assert np.isinf(interval["high"]) and 8.5 < interval["low"] < 9.9


def test_where_studies_missed_their_own_length_counts_and_not_what_others_could_train() -> None:
    log_times = noisy(TIED, 3)
    log_times[0, 0] = [np.log(8.0), NEVER, NEVER]
    studies = studies_table(log_times)
    other = estimate(studies.assign(budget=1.3 * BUDGET), baseline="s1")
    uncertainty = estimate(studies, baseline="s1")
    assert other.times.iloc[0].equals(uncertainty.times.iloc[0]) and np.isinf(uncertainty.times["high"][0])
    assert uncertainty.scores.loc["s0", "low"] < 0.7
    assert other.scores.loc["s0", "low"] == pytest.approx(uncertainty.scores.loc["s0", "low"], abs=1e-3)


def test_crossings_at_the_same_evaluation_have_width() -> None:
    uncertainty = estimate(studies_table(np.repeat(TIED[..., None], 5, axis=-1), resolution=0.05), baseline="s0")
    assert uncertainty.sigma == pytest.approx(0.05 / np.sqrt(12))
    assert (uncertainty.times["high"] > 1.01 * uncertainty.times["low"]).all()


@pytest.mark.parametrize(
    ("resolution", "verdict"), [(0.0, "a faster"), (0.03, "a faster"), (0.1, "no difference shown")]
)
def test_differences_within_the_resolution_are_no_differences(resolution: float, verdict: str) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 2, 5))
    log_times = np.log([[3.0, 4.0], [3.3, 4.4]])[..., None] + 0.005 * noise
    pair = estimate(studies_table(log_times, resolution=resolution), baseline="s0").pairs.iloc[0]
    assert pair["verdict"] == verdict
    assert (pair["high"] < np.log1p(-resolution)) == (pair["p"] < 0.05) == (verdict == "a faster")


def test_ranks_follow_the_corrected_comparisons() -> None:
    steps = np.array([0.0, 0.02, 0.04, 0.5])[:, None]
    uncertainty = estimate(studies_table(noisy(TIED + steps, 3)), baseline="s0")
    assert uncertainty.ranks.loc["s3"].tolist() == [4, 4]
    assert (uncertainty.ranks["high"][:3] <= 3).all() and (uncertainty.ranks["high"] >= uncertainty.ranks["low"]).all()
    p, corrected = uncertainty.pairs["p"].to_numpy(), uncertainty.pairs["p_holm"].to_numpy()
    order = np.argsort(p)
    np.testing.assert_allclose(corrected[order], np.minimum(1, np.maximum.accumulate(p[order] * np.arange(6, 0, -1))))
    assert ((corrected <= 0.05) == uncertainty.pairs["verdict"].isin(["a faster", "b faster"])).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), studies=st.sampled_from([2, 3, 10]), unit=st.sampled_from([1e-3, 60.0, 7.3]))
def test_order_names_and_units_change_nothing(seed: int, studies: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    rows = studies_table(noisy(MIXED, studies, seed), resolution=0.02)
    if seed % 2 and studies < 10:
        rows = rows.sample(frac=0.8, random_state=seed)
    names = dict(zip([f"s{i}" for i in range(4)], [f"z{i}" for i in rng.permutation(4)], strict=True))
    original = {new: old for old, new in names.items()}
    renamed = rows.assign(submission=rows["submission"].map(names)).sample(frac=1, random_state=seed)
    renamed[["time", "limit", "resolution", "budget"]] *= unit
    plain, other = estimate(rows, baseline="s0"), estimate(renamed, baseline=names["s0"])
    for name in ("scores", "speedups", "ranks"):
        expected, actual = getattr(plain, name), getattr(other, name).rename(index=original)
        np.testing.assert_allclose(actual.loc[expected.index], expected, rtol=1e-6, atol=1e-9)
    keys = ["submission", "workload"]
    times = other.times.assign(submission=other.times["submission"].map(original)).sort_values(keys)
    np.testing.assert_allclose(times[["low", "high"]], unit * plain.times.sort_values(keys)[["low", "high"]], rtol=1e-6)
    for ours in plain.pairs.itertuples():
        pair = {names[ours.a], names[ours.b]}
        row = other.pairs[other.pairs["a"].isin(pair) & other.pairs["b"].isin(pair)].iloc[0]
        assert ours.p_holm == pytest.approx(row["p_holm"], rel=1e-6, abs=1e-12, nan_ok=True)
        if names[ours.a] == row["a"]:
            assert ours.verdict == row["verdict"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=st.tuples(*[st.integers(1, 4)] * 2, st.sampled_from([1, 2, 3, 10])))
def test_odd_tables_are_no_crash(seed: int, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    rows = studies_table(LIMIT + rng.normal(rng.choice([-1.0, 0.0, 9.0]), rng.choice([0.0, 0.1, 1.0]), shape))
    rows["resolution"] = rng.choice([0.0, 0.1, 10 * BUDGET, np.nan], len(rows))
    rows.loc[rng.random(len(rows)) < 0.2, "limit"] = np.nan
    rows = rows[rng.random(len(rows)) < rng.choice([0.3, 1.0])]
    if rng.random() < 0.5:
        rows = rows.drop(columns="budget")
    with np.errstate(all="raise", under="ignore"):
        uncertainty = estimate(rows, baseline="s0" if rng.random() < 0.7 else None)
    scores = uncertainty.scores.dropna()
    assert ((scores["low"] >= 0) & (scores["low"] <= scores["high"]) & (scores["high"] <= 1)).all()
    times = uncertainty.times.dropna()
    assert (times["low"] <= times["high"]).all()
    assert (uncertainty.ranks["low"] <= uncertainty.ranks["high"]).all()
    assert len(uncertainty.pairs) == len(uncertainty.ranks) * (len(uncertainty.ranks) - 1) // 2
    undecided = uncertainty.pairs["verdict"] == "no verdict"
    assert (uncertainty.pairs["reason"][undecided] != "").all() and (
        uncertainty.pairs["reason"][~undecided] == ""
    ).all()


def test_forty_submissions_are_all_compared() -> None:
    medians = np.log(3) + 0.3 * np.random.default_rng(0).standard_normal((40, 10))
    uncertainty = estimate(studies_table(noisy(medians, 5)), baseline="s0")
    assert len(uncertainty.pairs) == 780 and len(uncertainty.pairs_by_workload) == 7800
    assert np.isfinite(uncertainty.pairs["p"]).all() and uncertainty.scores.notna().all(axis=None)


# ---- the error of the timing run -----------------------------------------------------------------------------------


def timed(log_times: np.ndarray, error: float, dof: float = 14.0) -> pd.DataFrame:
    """Log times [submissions, workloads, studies] of a timing run whose seconds per step have this relative error."""
    return studies_table(log_times).assign(timing_error=error, timing_dof=dof)


@pytest.mark.parametrize("studies", [3, 9, 24])
def test_studies_do_not_make_the_error_of_the_timing_run_smaller(studies: int) -> None:
    log_times = 0.01 * np.random.default_rng(0).standard_normal((3, 2, studies)) + np.log([3.0, 4.0])[:, None]
    error = 0.05
    with_error, without = (estimate(timed(log_times, e), baseline="s0") for e in (error, 0.0))
    # The quantile of the timing run's own degrees of freedom, within the noise of the bootstrap's draws.
    least = 0.9 * stats.t.ppf(0.975, 14) * error
    for low, high in (
        np.log(with_error.times[["low", "high"]].to_numpy()).T,
        np.log(with_error.speedups.drop("s0")[["low", "high"]].to_numpy()).T,
    ):
        assert ((high - low) / 2 >= least).all()
    assert (np.log(without.times["high"] / without.times["low"]) / 2 < least / 2).all()
    assert with_error.detectable > without.detectable


def test_the_error_of_the_timing_run_adds_to_that_of_the_studies() -> None:
    """Without misses and for one workload: a Welch interval with the variances of both."""
    log_times = 0.03 * np.random.default_rng(1).standard_normal((2, 1, 5)) + 1.0
    error, dof = 0.02, 14.0
    pair = estimate(timed(log_times, error, dof), baseline=None).pairs.iloc[0]
    of_studies = 2 * estimate(timed(log_times, 0.0), baseline=None).sigma ** 2 / 5
    total = of_studies + 2 * error**2
    combined = total**2 / (of_studies**2 / 8 + 2 * error**4 / dof)
    half = stats.t.ppf(0.975, combined) * np.sqrt(total)
    assert (pair["high"] - pair["low"]) / 2 == pytest.approx(half, rel=1e-9)


def test_a_verdict_needs_more_than_the_error_of_the_timing_run() -> None:
    log_times = np.array([[[1.0, 1.002, 0.998, 1.001]], [[1.03, 1.031, 1.029, 1.028]]])
    verdicts = [estimate(timed(log_times, error), baseline=None).pairs["verdict"][0] for error in (0.0, 0.03)]
    assert verdicts == ["a faster", "no difference shown"]


def test_no_error_changes_nothing() -> None:
    table = studies_table(noisy(MIXED, 3))
    plain, zero = estimate(table, baseline="s0"), estimate(timed(noisy(MIXED, 3), 0.0), baseline="s0")
    for name in ("times", "scores", "speedups", "pairs", "ranks"):
        pd.testing.assert_frame_equal(getattr(plain, name), getattr(zero, name))


def test_intervals_cover_the_truth_under_an_error_that_all_studies_share() -> None:
    """The error of the timing run is three times that of the studies' mean."""
    rng = np.random.default_rng(2)
    covered: dict[bool, list[float]] = {True: [], False: []}
    truth = np.log([3.0, 4.0]) + np.array([0.0, 0.1, 0.2])[:, None]
    for _ in range(150):
        shift = 0.05 * rng.standard_normal(truth.shape)
        log_times = (truth + shift)[..., None] + 0.03 * rng.standard_normal((*truth.shape, 3))
        for is_told, error in ((True, 0.05), (False, 0.0)):
            times = estimate(timed(log_times, error, dof=1e6), baseline=None, draws=50).times
            inside = (times["low"] <= np.exp(truth).ravel()) & (np.exp(truth).ravel() <= times["high"])
            covered[is_told].append(inside.mean())
    assert np.mean(covered[True]) >= 0.93
    assert np.mean(covered[False]) <= 0.75
