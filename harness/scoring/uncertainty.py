"""How sure a leaderboard is: intervals for times, scores and speed-ups, and which differences are real.

By the number of studies that each (submission, workload) has, the intervals come from

- the **t model** below ten, with one variance for the whole table and misses censored,
- the **bootstrap** from ten on,
- **nothing**, with fewer than four pooled degrees of freedom: every interval is NaN.

The two models are in harness/median_models.py. Resampling the median of three studies instead covers 74% where it says
95%.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from harness.scoring.benchmark_score import TAU_MAX
from harness.scoring.interval_models import (
    MIN_DOF,
    Array,
    Mask,
    Model,
    Table,
    bootstrap,
    mean_of_hits,
    spread,
    t_model,
    tabulate,
)

BOOTSTRAP_STUDIES = 10
"""Studies that every cell needs before the bootstrap replaces the t model."""
POWER = 0.8
"""Probability with which the `detectable` difference is detected."""


@dataclass(frozen=True)
class Uncertainty:
    """What `estimate` returns; frames are sorted by name. All intervals are two-sided, each at `level` by itself."""

    method: str
    """What was done, in a sentence for the reader."""
    sigma: float
    """Standard deviation of log time between studies, pooled over cells."""
    dof: float
    """Its degrees of freedom; what the misses tell counts, so this need not be an integer."""
    times: pd.DataFrame
    """submission, workload, low, high: the median time-to-target; high is infinite where the misses leave it open."""
    scores: pd.DataFrame
    """By submission: low, high of the benchmark score."""
    speedups: pd.DataFrame
    """By submission: low, high of the geometric mean over workloads of time[baseline] / time[submission]."""
    pairs: pd.DataFrame
    """a, b, log_ratio (mean over shared workloads of log time a - log time b), low, high, p, p_holm, verdict, reason.

    Where one of the two missed a target, log_ratio is a bound and one of low, high is infinite. p is for a difference
    beyond the evaluations' resolution; the verdict follows p_holm.
    """
    pairs_by_workload: pd.DataFrame
    """The same for every workload by itself; Holm's correction is over all rows."""
    ranks: pd.DataFrame
    """By submission: low = 1 + number of submissions shown to be faster, high = S - number shown to be slower."""
    detectable: float
    """Smallest ratio of times between two submissions, over all their workloads, that a single comparison at `level`,
    without Holm's correction, detects with 80% power; for the pair of median precision. NaN without intervals."""


def estimate(
    studies: pd.DataFrame, *, baseline: str | None, tau_max: float = TAU_MAX, level: float = 0.95, seed: int = 0
) -> Uncertainty:
    """Intervals and comparisons for a table of studies.

    `studies` has a row per (submission, workload, study) with the study's best trial: `time` to the target (infinite:
    missed), `limit` (how long it trained, read for misses only), `resolution` (time from the evaluation before to the
    one at the target; NaN: unknown), and optionally `budget` (how long it could have trained; NaN: unknown), read where
    every study of a cell met the target; without it the median is taken to meet it too. One unit for all of these. Base
    workloads only. Does not depend on the order of rows or on the submissions' names.
    """
    table = tabulate(studies)
    rng = np.random.default_rng(seed)
    sigma, dof, pairing = spread(table)
    per_cell = table.count[table.count > 0]
    model: Model | None = None
    if per_cell.size and per_cell.min() >= BOOTSTRAP_STUDIES:
        model = bootstrap(table, pairing.correlation, level, rng)
        name = f"bootstrap of the median, smoothed, {int(per_cell.min())} or more studies per cell"
    elif dof >= MIN_DOF:
        model, sigma, dof = t_model(table, pairing, level, rng)
        name = "t model on log time, variance pooled over submissions and workloads, misses censored at their limit"
    if model is None:
        sigma = sigma if dof > 0 else np.nan
        few = "no studies" if not per_cell.size else "a single study" if per_cell.max() == 1 else "too few studies"
        method = f"No intervals: {few} ({dof:g} pooled degrees of freedom, {MIN_DOF} are needed)."
    else:
        few = ""
        method = f"{name}; sigma of log time {sigma:.3g} with {dof:.3g} degrees of freedom; {pairing.found}."
        method = method[0].upper() + method[1:]

    submissions, workloads = table.submissions, table.workloads
    first, second = np.triu_indices(len(submissions), 1)
    everything = np.ones((len(first), len(workloads)), dtype=bool)
    pairs, errors, margins = _compare(table, model, first, second, everything, level, few)
    single = np.tile(np.eye(len(workloads), dtype=bool), (len(first), 1))
    repeat = np.repeat(np.arange(len(first)), len(workloads))
    by_workload, _, _ = _compare(table, model, first[repeat], second[repeat], single, level, few)
    by_workload.insert(2, "workload", np.tile(np.array(workloads, dtype=object), len(first)))

    index = pd.Index(submissions, name="submission")
    present = table.count > 0
    low, high = (np.exp(model.low), np.exp(model.high)) if model else (np.full(present.shape, np.nan),) * 2
    s, w = np.nonzero(present)
    times = pd.DataFrame(
        {
            "submission": np.array(submissions, dtype=object)[s],
            "workload": np.array(workloads, dtype=object)[w],
            "low": low[s, w],
            "high": high[s, w],
        }
    )
    detectable = float(np.exp(np.median(errors) + np.median(margins))) if len(errors) else np.nan
    return Uncertainty(
        method=method,
        sigma=float(sigma),
        dof=float(dof),
        times=times,
        scores=_scores(table, model, tau_max, level, index),
        speedups=_speedups(table, model, baseline, level, index),
        pairs=pairs,
        pairs_by_workload=by_workload,
        ranks=_ranks(pairs, index),
        detectable=detectable,
    )


def _scores(table: Table, model: Model | None, tau_max: float, level: float, index: pd.Index) -> pd.DataFrame:
    """Percentiles of the benchmark score over the model's draws, with two biases taken out.

    The smallest of noisy times is too small, and the smallest of redrawn noisy times twice so: nearly equal
    submissions would all look beaten. Hence two best times. For the upper end a softmin, with weights p of width tau,
    plus v p (1 - p) / tau summed over submissions: by Stein's lemma (v the variance of a time) its expectation is
    that of the p-weighted *true* times, which is never below the true best and equals it when all are equal and when
    one is far ahead. For the lower end the smallest draw less the bias that redrawing adds.

    A submission near its limit on several workloads would rarely meet, or rarely miss, all those targets in one draw.
    So every target that it may have met counts as met for the upper end, at the limit if need be, and every target
    that it may have missed counts as missed for the lower.
    """
    if model is None or not len(index):
        return pd.DataFrame(np.nan, index=index, columns=["low", "high"])
    tail = (1 - level) / 2
    draws = np.where(np.isnan(model.draws), np.inf, model.draws)
    latent = np.where(np.isnan(model.unlimited), np.inf, model.unlimited)
    met = np.isfinite(draws).mean(axis=0)
    at_best = np.where(met > tail, np.minimum(latent, table.limit), np.inf)
    at_worst = np.where(met < 1 - tail, np.inf, latent)

    least = draws.min(axis=1, keepdims=True)
    solved = np.isfinite(least)
    least = np.where(solved, least, 0.0)
    known = np.isfinite(model.unlimited).any(axis=0)
    variance = np.where(known, model.variance, 0.0) * (1 - model.correlation)
    width = np.sqrt(variance.sum(axis=0) / np.maximum(known.sum(axis=0), 1)) + 1e-12
    weight = np.exp(-(draws - least) / width)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    # The draws carry the noise of the times and as much again.
    correction = 2 * variance / width * weight * (1 - weight)
    softmin = (weight * np.where(np.isfinite(draws), draws, 0.0) + correction).sum(axis=1, keepdims=True)

    centre = np.where(known, model.centre, np.inf).min(axis=0)
    met_by_someone = np.isfinite(centre)
    added = np.where(met_by_someone, latent.min(axis=1), 0.0).mean(axis=0) - np.where(met_by_someone, centre, 0.0)

    def quantile(times: Array, best: Array, q: float) -> Array:
        with np.errstate(invalid="ignore"):
            log_ratios = np.where(np.isfinite(times), np.where(solved, times - best, 0.0), np.inf)
        scores = (np.clip(tau_max - np.exp(np.minimum(log_ratios, 700.0)), 0.0, None) / (tau_max - 1)).mean(axis=-1)
        return np.clip(np.quantile(scores, q, axis=0), 0.0, 1.0)

    return pd.DataFrame(
        {"low": quantile(at_worst, least - np.minimum(added, 0.0), tail), "high": quantile(at_best, softmin, 1 - tail)},
        index=index,
    )


def _standard_errors(
    table: Table, model: Model, first: NDArray[np.intp], second: NDArray[np.intp], use: Mask, *, bound: bool
) -> tuple[Array, Array, Array]:
    """Mean over the workloads in `use` [pairs, workloads] of log time first - second, its standard error and dof."""
    number = np.maximum(use.sum(axis=1), 1)
    missed = table.missed if bound else np.zeros_like(table.missed)
    centre = np.where(missed, model.bound, model.centre)
    variance = np.where(missed, model.bound_variance, model.variance)
    difference = np.where(use, centre[first] - centre[second], 0.0).sum(axis=1) / number
    each = variance[first] + variance[second]
    covariance = np.where(missed[first] | missed[second], 0.0, model.covariance[first, second])
    both = np.where(use, np.maximum(each - 2 * covariance, 1e-3 * each), 0.0)
    error = np.maximum(np.sqrt(both.sum(axis=1)) / number, 1e-12)
    if model.shared_dof:
        return difference, error, np.full(len(first), model.dof.flat[0])
    parts = np.where(use, variance[first] ** 2 / model.dof[first] + variance[second] ** 2 / model.dof[second], 0.0)
    total = np.where(use, each, 0.0).sum(axis=1)
    # Welch and Satterthwaite.
    return difference, error, np.maximum(total**2 / np.maximum(parts.sum(axis=1), 1e-300), 1.0)


def _compare(
    table: Table,
    model: Model | None,
    first: NDArray[np.intp],
    second: NDArray[np.intp],
    consider: Mask,
    level: float,
    few: str,
) -> tuple[pd.DataFrame, Array, Array]:
    """Compare pairs over the workloads in `consider` [pairs, workloads].

    Also the log ratios that pairs without misses detect with `POWER`, and how much of a log ratio their evaluations'
    resolution could explain: what the slower one could have crossed earlier.
    """
    present = table.count > 0
    shared = consider & present[first] & present[second]
    missed_first, missed_second = shared & table.missed[first], shared & table.missed[second]
    use = shared & ~(missed_first & missed_second)
    missed_first, missed_second = missed_first & use, missed_second & use
    lower, upper = missed_first.any(axis=1), missed_second.any(axis=1)  # log_ratio is a lower or an upper bound
    comparable = use.any(axis=1) & ~(lower & upper)
    number = np.maximum(use.sum(axis=1), 1)
    width = table.log_resolution
    # "first is faster" can be undone by an earlier crossing of the second, and the other way round.
    undo_below = np.where(use & ~missed_second, width[second], 0.0).sum(axis=1) / number
    undo_above = np.where(use & ~missed_first, width[first], 0.0).sum(axis=1) / number

    if model is None:
        centre = np.where(table.missed, table.limit, mean_of_hits(table))
        ratio = np.where(use, centre[first] - centre[second], 0.0).sum(axis=1) / number
        low = high = p = np.full(len(first), np.nan)
        errors = margins = np.array([])
    else:
        ratio, error, dof = _standard_errors(table, model, first, second, use, bound=True)
        quantile = stats.t.ppf((1 + level) / 2, dof)
        low = np.where(upper, -np.inf, ratio - quantile * error)
        high = np.where(lower, np.inf, ratio + quantile * error)
        below, above = (-ratio - undo_below) / error, (ratio - undo_above) / error
        beyond = np.maximum(np.where(lower, -np.inf, below), np.where(upper, -np.inf, above))
        p = np.minimum(2 * stats.t.sf(beyond, dof), 1.0)
        exact = comparable & ~lower & ~upper
        errors = (quantile + stats.t.ppf(POWER, dof))[exact] * error[exact]
        margins = np.maximum(undo_below, undo_above)[exact]
    ratio, low, high, p = (np.where(comparable, column, np.nan) for column in (ratio, low, high, p))
    p_holm = _holm(p)
    shown = p_holm <= 1 - level
    faster = np.where(ratio < 0, "a faster", "b faster")
    undecided = ~comparable | np.isnan(p) | ((lower | upper) & ~shown)
    verdict = np.where(shown, faster, np.where(undecided, "no verdict", "no difference shown"))

    names, tasks = np.array(table.submissions, dtype=object), np.array(table.workloads, dtype=object)
    reason = np.full(len(first), "", dtype=object)
    for i in np.nonzero(undecided)[0]:
        a, b = names[first[i]], names[second[i]]
        misses = [
            f"{name} missed {', '.join(tasks[missed[i]])}"
            for name, missed in ((a, missed_first), (b, missed_second))
            if missed[i].any()
        ]
        if not shared[i].any():
            reason[i] = "no workload that both ran"
        elif not use[i].any():
            reason[i] = "both missed the target" if shared[i].sum() == 1 else "both missed every target that they share"
        elif len(misses) == 2:
            reason[i] = "; ".join(misses)
        else:
            reason[i] = few or f"{misses[0]}, and how long it trained does not settle it"
    frame = pd.DataFrame(
        {
            "a": names[first],
            "b": names[second],
            "log_ratio": ratio,
            "low": low,
            "high": high,
            "p": p,
            "p_holm": p_holm,
            "verdict": verdict.astype(object),
            "reason": reason,
        }
    )
    return frame, errors, margins


def _holm(p: Array) -> Array:
    """Holm's (1979) step-down correction; NaN stays NaN and is not counted."""
    corrected = np.full(len(p), np.nan)
    tested = np.nonzero(np.isfinite(p))[0]
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return corrected


def _speedups(table: Table, model: Model | None, baseline: str | None, level: float, index: pd.Index) -> pd.DataFrame:
    """Read as `benchmark_score.speedups`: a miss stands at its limit, so that the interval is open on its side."""
    frame = pd.DataFrame(np.nan, index=index, columns=["low", "high"])
    if model is None or baseline not in table.submissions:
        return frame
    first = np.full(len(index), table.submissions.index(baseline))
    second = np.arange(len(index))
    shared = (table.count > 0)[first] & (table.count > 0)[second]
    theirs, own = table.missed[first] & shared, table.missed[second] & shared
    use = shared & ~(theirs & own)
    their_miss, own_miss = (theirs & ~own).any(axis=1), (own & ~theirs).any(axis=1)
    ratio, error, dof = _standard_errors(table, model, first, second, use, bound=True)
    half = stats.t.ppf((1 + level) / 2, dof) * error
    known = use.any(axis=1) & ~(their_miss & own_miss)
    frame["low"] = np.where(known, np.where(own_miss, 0.0, np.exp(ratio - half)), np.nan)
    frame["high"] = np.where(known, np.where(their_miss, np.inf, np.exp(ratio + half)), np.nan)
    if known[first[0]]:
        frame.loc[baseline] = 1.0
    return frame


def _ranks(pairs: pd.DataFrame, index: pd.Index) -> pd.DataFrame:
    a_faster, b_faster = pairs[pairs["verdict"] == "a faster"], pairs[pairs["verdict"] == "b faster"]
    beaten_by = pd.concat([a_faster["b"], b_faster["a"]]).value_counts().reindex(index, fill_value=0)
    beats = pd.concat([a_faster["a"], b_faster["b"]]).value_counts().reindex(index, fill_value=0)
    return pd.DataFrame({"low": 1 + beaten_by, "high": len(index) - beats}, index=index)
