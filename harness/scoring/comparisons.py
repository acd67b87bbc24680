"""Differences between submissions: ratios of their times with intervals, tests, verdicts, ranks and speed-ups.

A comparison is made over the workloads that both submissions ran, less those that both missed. Where one of the two
missed a target, its limit bounds its time, and the ratio is a bound. Arrays are [pairs] or [pairs, workloads].
Derivations: docs/statistics.md, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from harness.scoring.interval_models import MedianModel
from harness.scoring.study_table import Array, Index, Mask, StudyTable

POWER = 0.8
"""Probability with which the detectable difference is detected."""
A_FASTER, B_FASTER = "a faster", "b faster"
NO_DIFFERENCE, NO_VERDICT = "no difference shown", "no verdict"


@dataclass(frozen=True)
class PairedWorkloads:
    """Which workloads count in which pair: bool [pairs, workloads] unless noted."""

    first: Index
    second: Index
    """The pair's submissions by their number: int [pairs]."""
    shared: Mask
    """Both submissions ran the workload."""
    used: Mask
    """Shared, and not missed by both."""
    first_missed: Mask
    second_missed: Mask
    """Used, and missed by this submission alone."""

    @property
    def is_lower_bound(self) -> Mask:
        """The ratio first / second is at least the estimate, as the first missed a target: bool [pairs]."""
        return np.asarray(self.first_missed.any(axis=1))

    @property
    def is_upper_bound(self) -> Mask:
        """The ratio first / second is at most the estimate, as the second missed a target: bool [pairs]."""
        return np.asarray(self.second_missed.any(axis=1))

    @property
    def is_comparable(self) -> Mask:
        """Some workload is used, and the misses do not bound the ratio on both sides: bool [pairs]."""
        return self.used.any(axis=1) & ~(self.is_lower_bound & self.is_upper_bound)

    def mean(self, values: Array) -> Array:
        """Mean of `values` [pairs, workloads] over the used workloads, 0 without any: [pairs]."""
        return np.where(self.used, values, 0.0).sum(axis=1) / np.maximum(self.used.sum(axis=1), 1)


@dataclass(frozen=True)
class PairEstimates:
    """Estimates of log(time of the first / time of the second), each [pairs]; NaN where nothing can be stated."""

    log_ratio: Array
    low: Array
    high: Array
    p: Array
    """For a difference beyond the resolution of the evaluations, two-sided."""
    p_holm: Array
    """`p` corrected for the number of pairs."""
    detectable: float
    """See `uncertainty.Uncertainty.detectable`."""


@dataclass(frozen=True)
class Comparisons:
    """What `compare` returns."""

    workloads: PairedWorkloads
    pairs: pd.DataFrame
    """A row per pair; see `uncertainty.Uncertainty.pairs`."""
    detectable: float
    """See `uncertainty.Uncertainty.detectable`."""


def compare(
    table: StudyTable, model: MedianModel | None, workloads: PairedWorkloads, level: float, why_no_model: str
) -> Comparisons:
    """Compare pairs of submissions, with intervals and tests at `level`.

    Without a model there are ratios, but neither intervals nor verdicts, and `why_no_model` is their reason.
    """
    estimates = _estimate_pairs(table, model, workloads, level)
    verdicts = _verdicts(workloads, estimates, level)
    names = np.array(table.submissions, dtype=object)
    pairs = pd.DataFrame(
        {
            "a": names[workloads.first],
            "b": names[workloads.second],
            "log_ratio": estimates.log_ratio,
            "low": estimates.low,
            "high": estimates.high,
            "p": estimates.p,
            "p_holm": estimates.p_holm,
            "verdict": verdicts,
            "reason": _reasons(table, workloads, verdicts, why_no_model),
        }
    )
    return Comparisons(workloads, pairs, estimates.detectable)


def pair_workloads(table: StudyTable, first: Index, second: Index, considered: Mask) -> PairedWorkloads:
    """Which of the workloads in `considered`, bool [pairs, workloads], each pair can be compared on."""
    has_study = table.study_count > 0
    shared = considered & has_study[first] & has_study[second]
    first_missed, second_missed = shared & table.median_missed[first], shared & table.median_missed[second]
    used = shared & ~(first_missed & second_missed)
    return PairedWorkloads(first, second, shared, used, first_missed & used, second_missed & used)


def _estimate_pairs(
    table: StudyTable, model: MedianModel | None, workloads: PairedWorkloads, level: float
) -> PairEstimates:
    """Intervals and tests of the pairs (docs/statistics.md, eq. 28 to 33, 35)."""
    comparable, is_lower, is_upper = workloads.is_comparable, workloads.is_lower_bound, workloads.is_upper_bound
    detectable = np.nan
    if model is None:
        log_times = np.where(table.median_missed, table.log_bound, table.mean_log_time)
        log_ratio = workloads.mean(log_times[workloads.first] - log_times[workloads.second])
        low = high = p = np.full(len(log_ratio), np.nan)
    else:
        # docs/statistics.md, eq. 31.
        log_ratio, error, dof = log_ratios(table, model, workloads)
        quantile = stats.t.ppf((1 + level) / 2, dof)
        low = np.where(is_upper, -np.inf, log_ratio - quantile * error)
        high = np.where(is_lower, np.inf, log_ratio + quantile * error)

        # docs/statistics.md, eq. 32: "the first is faster" fails if the second can have met its targets that much
        # earlier, and vice versa.
        # A missed target was met at no evaluation, so it has no width.
        width = table.log_resolution
        first_width = workloads.mean(np.where(workloads.first_missed, 0.0, width[workloads.first]))
        second_width = workloads.mean(np.where(workloads.second_missed, 0.0, width[workloads.second]))
        # A lower bound of the ratio can never show that the first is faster, nor an upper one that the second is.
        first_faster = np.where(is_lower, -np.inf, (-log_ratio - second_width) / error)
        second_faster = np.where(is_upper, -np.inf, (log_ratio - first_width) / error)
        p = np.minimum(2 * stats.t.sf(np.maximum(first_faster, second_faster), dof), 1.0)

        # docs/statistics.md, eq. 35: of pairs without misses, since the standard error of a bound is not that of a
        # ratio.
        exact = comparable & ~is_lower & ~is_upper
        if exact.any():
            errors = (quantile + stats.t.ppf(POWER, dof))[exact] * error[exact]
            widths = np.maximum(first_width, second_width)[exact]
            detectable = float(np.exp(np.median(errors) + np.median(widths)))
    log_ratio, low, high, p = (np.where(comparable, column, np.nan) for column in (log_ratio, low, high, p))
    return PairEstimates(log_ratio, low, high, p, holm(p), detectable)


def log_ratios(table: StudyTable, model: MedianModel, workloads: PairedWorkloads) -> tuple[Array, Array, Array]:
    """Mean log ratio first / second over the used workloads, its standard error and degrees of freedom: each [pairs].

    A missed cell enters with its bound (docs/statistics.md, eq. 28 to 30). Without a used workload the log ratio is 0.
    """
    first, second = workloads.first, workloads.second
    missed = table.median_missed
    estimate = np.where(missed, model.bound, model.estimate)
    variance = np.where(missed, model.bound_variance, model.variance)
    differences, first_variance, second_variance = estimate[first] - estimate[second], variance[first], variance[second]
    # A missed cell enters with its limit, which has no noise in common with the other's times.
    covariance = np.where(missed[first] | missed[second], 0.0, model.covariance[first, second])
    if model.means is not None:
        # docs/statistics.md, eq. 30b.
        means = model.means
        is_complete = ~np.isnan(means.estimate[first]) & ~np.isnan(means.estimate[second])
        differences = np.where(is_complete, means.estimate[first] - means.estimate[second], differences)
        first_variance = np.where(is_complete, means.variance[first], first_variance)
        second_variance = np.where(is_complete, means.variance[second], second_variance)
        covariance = np.where(is_complete, means.covariance[first, second], covariance)
    log_ratio = workloads.mean(differences)
    unpaired = first_variance + second_variance
    # docs/statistics.md, eq. 29. The covariance is an estimate too: it must not take the variance of a difference to
    # zero or below.
    paired = np.where(workloads.used, np.maximum(unpaired - 2 * covariance, 1e-3 * unpaired), 0.0)
    number = np.maximum(workloads.used.sum(axis=1), 1)
    # Above zero also for pairs that cannot be compared; they become NaN later, and nothing is divided by zero.
    error = np.maximum(np.sqrt(paired.sum(axis=1)) / number, 1e-12)
    timing = np.where(workloads.used, model.timing_variance[first] + model.timing_variance[second], 0.0)
    # Each submission and workload was timed by itself, so every part counts by its own square.
    squares = model.timing_variance**2 / model.timing_dof
    timing_parts = np.where(workloads.used, squares[first] + squares[second], 0.0).sum(axis=1)
    if model.has_shared_dof:
        dof = np.full(len(first), model.dof.flat[0])
        # docs/statistics.md, eq. 30a. The variances of the studies add up first, being multiples of one estimate.
        of_studies = np.maximum(paired - timing, 0.0).sum(axis=1)
        combined = paired.sum(axis=1) ** 2 / np.maximum(of_studies**2 / dof + timing_parts, 1e-300)
        return log_ratio, error, np.where(timing.sum(axis=1) > 0, combined, dof)
    # docs/statistics.md, eq. 30.
    shared = model.timing_variance
    parts = (first_variance - shared[first]) ** 2 / model.dof[first]
    parts = parts + (second_variance - shared[second]) ** 2 / model.dof[second]
    total = np.where(workloads.used, unpaired, 0.0).sum(axis=1)
    denominator = np.where(workloads.used, parts, 0.0).sum(axis=1) + timing_parts
    return log_ratio, error, np.maximum(total**2 / np.maximum(denominator, 1e-300), 1.0)


def holm(p: Array) -> Array:
    """Holm's (1979) step-down correction of p values [tests]; NaN stays NaN and is not counted as a test (eq. 33)."""
    corrected = np.full(len(p), np.nan)
    tested = np.nonzero(np.isfinite(p))[0]
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def _verdicts(workloads: PairedWorkloads, estimates: PairEstimates, level: float) -> NDArray[np.object_]:
    """A verdict per pair: str [pairs]. A bound that shows nothing leaves a pair without a verdict."""
    is_shown = estimates.p_holm <= 1 - level
    is_bound = workloads.is_lower_bound | workloads.is_upper_bound
    # A bound that is not significant is no evidence that the two are alike, as the ratio may be any larger or smaller.
    is_undecided = ~workloads.is_comparable | np.isnan(estimates.p) | (is_bound & ~is_shown)
    faster = np.where(estimates.log_ratio < 0, A_FASTER, B_FASTER)
    return np.where(is_shown, faster, np.where(is_undecided, NO_VERDICT, NO_DIFFERENCE)).astype(object)


def _reasons(
    table: StudyTable, workloads: PairedWorkloads, verdicts: NDArray[np.object_], why_no_model: str
) -> NDArray[np.object_]:
    """Why a pair has no verdict, empty for those that have one: str [pairs]."""
    reasons = np.full(len(verdicts), "", dtype=object)
    for pair in np.nonzero(verdicts == NO_VERDICT)[0].tolist():
        reasons[pair] = _reason(table, workloads, pair, why_no_model)
    return reasons


def _reason(table: StudyTable, workloads: PairedWorkloads, pair: int, why_no_model: str) -> str:
    """Why one pair has no verdict. pair: its row."""
    shared = workloads.shared[pair]
    if not shared.any():
        return "no workload that both ran"
    if not workloads.used[pair].any():
        return "both missed the target" if shared.sum() == 1 else "both missed every target that they share"
    names = np.array(table.workloads, dtype=object)
    misses = [
        f"{table.submissions[submission]} missed {', '.join(names[missed])}"
        for submission, missed in (
            (workloads.first[pair], workloads.first_missed[pair]),
            (workloads.second[pair], workloads.second_missed[pair]),
        )
        if missed.any()
    ]
    if len(misses) == 2:
        return "; ".join(misses)
    return why_no_model or f"{misses[0]}, and how long it trained does not settle it"


def rank_ranges(comparisons: Comparisons, index: pd.Index) -> pd.DataFrame:
    """By submission: low, high of its rank, int from 1, from the pairs with a verdict (docs/statistics.md, eq. 34).

    index: the submissions in the order of their numbers in `comparisons.workloads`.
    """
    first, second = comparisons.workloads.first, comparisons.workloads.second
    verdict = comparisons.pairs["verdict"].to_numpy()
    faster = np.concatenate([first[verdict == A_FASTER], second[verdict == B_FASTER]])
    slower = np.concatenate([second[verdict == A_FASTER], first[verdict == B_FASTER]])
    beats, beaten_by = (np.bincount(submissions, minlength=len(index)) for submissions in (faster, slower))
    return pd.DataFrame({"low": 1 + beaten_by, "high": len(index) - beats}, index=index)


def speedup_intervals(
    table: StudyTable, model: MedianModel | None, baseline: str | None, level: float, index: pd.Index
) -> pd.DataFrame:
    """By submission: low, high of time[baseline] / time[submission], as `benchmark_score.speedups` defines it (eq. 36).

    NaN without a model or baseline, and where misses bound the ratio on both sides. A miss enters with its limit, so
    that the interval is open towards the side that the miss leaves open.
    """
    if model is None or baseline not in table.submissions:
        return pd.DataFrame(np.nan, index=index, columns=["low", "high"])
    # The baseline is the first of each pair, so that the ratio is its time over the submission's. A miss of the first
    # leaves the ratio open towards infinity, one of the second towards zero.
    first = np.full(len(index), table.submissions.index(baseline))
    second = np.arange(len(index))
    workloads = pair_workloads(table, first, second, np.ones((len(index), len(table.workloads)), dtype=bool))
    log_ratio, error, dof = log_ratios(table, model, workloads)
    half = stats.t.ppf((1 + level) / 2, dof) * error
    is_baseline, is_known = first == second, workloads.is_comparable
    low = np.where(is_baseline, 1.0, np.where(workloads.is_upper_bound, 0.0, np.exp(log_ratio - half)))
    high = np.where(is_baseline, 1.0, np.where(workloads.is_lower_bound, np.inf, np.exp(log_ratio + half)))
    ends = {"low": np.where(is_known, low, np.nan), "high": np.where(is_known, high, np.nan)}
    return pd.DataFrame(ends, index=index)
