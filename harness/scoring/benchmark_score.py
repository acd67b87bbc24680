"""The scores: who reaches the targets fastest, as formulas over tables of times.

Times are arrays float [..., submissions, workloads], in any unit (seconds, nominal steps, gradient examples), above
zero, and infinite where the target was not met. After Dahl et al. 2023, "Benchmarking Neural Network Training
Algorithms", arXiv:2306.07179, section 4 (docs/statistics.md, eq. 3 to 6):

    r[s, w]  = time[s, w] / min over s' of time[s', w]                         performance ratio
    p_s(tau) = (1 / n) sum over w of [r[s, w] <= tau]                          performance profile
    B_s      = 1 / (tau_max - 1) * integral from 1 to tau_max of p_s(tau) dtau
             = (1 / n) sum over w of max(0, tau_max - r[s, w]) / (tau_max - 1) benchmark score, in [0, 1]

A workload that nobody solved counts in n and gives nothing to anyone.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.scoring.targets import Targets

TAU_MAX = 4.0
"""Times slower than this many times the fastest score nothing."""
Array = NDArray[np.float64]


def performance_ratios(times: Array) -> Array:
    """r [..., submissions, workloads], infinite where the target was not met."""
    best = times.min(axis=-2, keepdims=True)
    # docs/statistics.md, eq. 4; inf / inf where nobody met the target.
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(np.isfinite(times), times / best, np.inf))


def performance_profile(times: Array, taus: Array) -> Array:
    """p_s(tau): float [submissions, taus], for times [submissions, workloads]."""
    solved = performance_ratios(times)[:, :, None] <= taus
    return np.ascontiguousarray(solved.mean(axis=1))


def benchmark_scores(times: Array, tau_max: float = TAU_MAX) -> Array:
    """B_s in closed form: float [..., submissions]."""
    terms = np.clip(tau_max - performance_ratios(times), 0.0, None) / (tau_max - 1.0)
    # NumPy adds up in another order where memory is laid out by columns, as that of a DataFrame may be: the last bit of
    # a score would depend on the version of pandas.
    return np.asarray(np.ascontiguousarray(terms).mean(axis=-1))


def algoperf_scores(times: Array, tau_max: float = TAU_MAX) -> Array:
    """B_s as AlgoPerf publishes it: the trapezoid rule over 100 points of the profile; float [submissions]."""
    # As many points as AlgoPerf's code takes: the error of the rule is part of the published scores.
    taus = np.linspace(1.0, tau_max, 100)
    return np.asarray(np.trapezoid(performance_profile(times, taus), taus, axis=1)) / (tau_max - 1.0)


def qualified(times: pd.DataFrame, targets: Targets, tau_max: float = TAU_MAX) -> pd.DataFrame:
    """Times on the base workloads that count, by AlgoPerf's rule for held-out workloads.

    `times` has a row per submission and a column per workload, base and held-out; absent or NaN means not run. A
    held-out time counts only where its base workload was solved. A time above tau_max times the fastest becomes
    infinite; then a base time becomes infinite where any of its held-out workloads is (see `disqualified`). Held-out
    workloads that no submission ran are left out of this; see `unscored_held_out`.
    """
    table = _within(times, targets, tau_max)
    return table[list(targets.base)].mask(disqualified(times, targets, tau_max), np.inf)


def disqualified(times: pd.DataFrame, targets: Targets, tau_max: float = TAU_MAX) -> pd.DataFrame:
    """Which base workloads give no points, as a held-out variant was not trained or not fast enough.

    bool, a row per submission, a column per base workload; `times` as for `qualified`.
    """
    table = _within(times, targets, tau_max)
    failed = pd.DataFrame(False, index=table.index, columns=list(targets.base))
    # `_within` has left out the variants that nobody ran, so that they disqualify nobody.
    for workload in table.columns.difference(list(targets.base)):
        failed[targets.base_of(workload)] |= np.isinf(table[workload])
    return failed


def _within(times: pd.DataFrame, targets: Targets, tau_max: float) -> pd.DataFrame:
    """The times within tau_max times the fastest, infinite elsewhere; of held-out workloads those that anyone ran."""
    held_out = [workload for workload in targets.held_out if workload in times and times[workload].notna().any()]
    table = times.reindex(columns=[*targets.base, *held_out]).fillna(np.inf)
    for workload in held_out:
        # Who does not solve the base workload must not set the standard of its variant.
        table[workload] = table[workload].mask(np.isinf(table[targets.base_of(workload)]), np.inf)
    return table.mask(table > tau_max * table.min(), np.inf)


def unscored_held_out(times: pd.DataFrame, targets: Targets) -> list[str]:
    """Held-out workloads that no submission ran: they disqualify nobody."""
    return [workload for workload in targets.held_out if workload not in times or times[workload].isna().all()]


def study_times(trials: pd.DataFrame, column: str, *, by_index: bool = False) -> pd.DataFrame:
    """The best trial of each study: a row per (submission, workload, study).

    Columns: `column`, infinite if no trial met the target, and `row`, the row label in `trials` of the best one.
    `trials` has columns submission, workload, study, trial, `column` (infinite or NaN: target not met), and for
    `by_index` also index. The best is the one with the smallest `column`; with `by_index`, as AlgoPerf chooses, the one
    whose evaluation index at the target is smallest, the first trial among equals, and `column` is read off there.
    """
    keys = ["submission", "workload", "study"]
    value = trials[column].where(np.isfinite(trials[column]), np.inf)
    rank = trials["index"].where(np.isfinite(value), np.inf) if by_index else value
    table = trials[[*keys, "trial"]].assign(_value=value, _rank=rank, row=trials.index)
    # Among equals the first trial, as AlgoPerf chooses; the order of the rows decides nothing.
    table = table.sort_values([*keys, "_rank", "trial"], kind="stable").drop_duplicates(keys)
    return table.drop(columns=["trial", "_rank"]).rename(columns={"_value": column}).reset_index(drop=True)


def times_to_target(studies: pd.DataFrame, column: str) -> pd.DataFrame:
    """Median over studies: a row per submission, a column per workload, NaN where a submission did not run it."""
    # A median between a finite and an infinite time is infinite; pandas would give NaN for two infinities.
    with np.errstate(invalid="ignore"):
        medians = studies.groupby(["submission", "workload"])[column].median()
    # In this order: the NaN that `unstack` adds mean that a workload was not run.
    return medians.fillna(np.inf).unstack("workload")


def speedups(times: Array, limits: Array, baseline: int) -> tuple[Array, list[str]]:
    """Geometric mean over workloads of time[baseline] / time[s] (docs/statistics.md, eq. 6), and its reading.

    times: float [submissions, workloads], infinite where missed, NaN where not run; limits: how long was trained, which
    stands in for the time of a miss and so bounds it. Workloads that either did not run or both missed are left out.
    Other submissions change nothing. Returns float [submissions] and for each one of

    - "exact": every ratio is known;
    - "upper bound": the submission missed a target that the baseline met;
    - "lower bound": the baseline missed a target that the submission met;
    - "none", with NaN: both kinds of miss occur, no workload is left, or a limit is unknown (NaN).
    """
    results = [_speedup(times[s], limits[s], times[baseline], limits[baseline]) for s in range(len(times))]
    return np.array([value for value, _ in results]), [reading for _, reading in results]


def _speedup(times: Array, limits: Array, base_times: Array, base_limits: Array) -> tuple[float, str]:
    """Of one submission over the baseline; all arrays [workloads]."""
    used = ~np.isnan(times) & ~np.isnan(base_times) & ~(np.isinf(times) & np.isinf(base_times))
    missed, base_missed = np.isinf(times[used]), np.isinf(base_times[used])
    # One kind of miss makes the ratio too large and the other too small, so both together bound nothing.
    if not used.any() or (missed.any() and base_missed.any()):
        return np.nan, "none"
    bounded = np.where(missed, limits[used], times[used])
    base_bounded = np.where(base_missed, base_limits[used], base_times[used])
    value = float(np.exp(np.log(base_bounded / bounded).mean()))
    if np.isnan(value):
        return np.nan, "none"
    return value, "upper bound" if missed.any() else "lower bound" if base_missed.any() else "exact"
