"""Intervals of the benchmark score, from joint draws of the log medians.

They are not the quantiles of the score's draws: each end has an estimator of the best time of its own, and of the
targets that count. Derivations: docs/statistics.md, section 8.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.scoring.interval_models import MedianModel
from harness.scoring.study_table import Array, StudyTable

LARGEST_LOG_RATIO = 700.0
"""exp of more overflows; such a ratio scores nothing anyway."""


def score_intervals(
    table: StudyTable, model: MedianModel | None, tau_max: float, level: float, index: pd.Index
) -> pd.DataFrame:
    """By submission: low, high of the benchmark score at `level`; NaN without a model."""
    if model is None or not len(index):
        return pd.DataFrame(np.nan, index=index, columns=["low", "high"])
    tail = (1 - level) / 2
    pessimistic, optimistic = _times_for_ends(table, model, tail)
    # Each end has an estimator of the best time that errs on its own side. With the smallest draw at both ends,
    # submissions that are equal would all look beaten: the smallest of noisy times is too small, and drawing adds the
    # same bias again.
    low = _scores(pessimistic, debiased_minimum(model), tau_max)
    high = _scores(optimistic, softmin_best(model), tau_max)
    ends = {"low": np.quantile(low, tail, axis=0), "high": np.quantile(high, 1 - tail, axis=0)}
    # The ends are clipped, and not the draws in `_scores`.
    return pd.DataFrame({name: np.clip(end, 0.0, 1.0) for name, end in ends.items()}, index=index)


def softmin_best(model: MedianModel) -> Array:
    """Best log time of each draw and workload for the upper end of the score: [D, 1, W].

    A softmin of the draws plus a correction, whose expectation is never below the true best time and equals it where
    all are equal or one is far ahead (docs/statistics.md, eq. 38 and 39). NaN where no draw meets the target.
    """
    draws = _absent_as_missed(model.draws)
    fastest = draws.min(axis=1, keepdims=True)
    is_solved = np.isfinite(fastest)
    # The noise that submissions share under a seed moves all of them and cancels in the ratio to the best.
    is_known = np.isfinite(model.latent_draws).any(axis=0)
    # The error of the timing run is each submission's own.
    seed_variance = (model.variance - model.timing_variance) * (1 - model.correlation)
    variance = np.where(is_known, seed_variance + model.timing_variance, 0.0)
    width = np.sqrt(variance.sum(axis=0) / np.maximum(is_known.sum(axis=0), 1)) + 1e-12
    # docs/statistics.md, eq. 38. Relative to the fastest, since exp(log time / width) over- or underflows.
    weight = np.exp(-(draws - np.where(is_solved, fastest, 0.0)) / width)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    # Twice the variance, since a draw carries the noise of the estimate and as much again of its own.
    correction = 2 * variance / width * weight * (1 - weight)
    softmin = (weight * np.where(np.isfinite(draws), draws, 0.0) + correction).sum(axis=1, keepdims=True)
    return np.where(is_solved, softmin, np.nan)


def debiased_minimum(model: MedianModel) -> Array:
    """Best log time of each draw and workload for the lower end of the score: [D, 1, W].

    The smallest draw less the bias that drawing adds (docs/statistics.md, eq. 40); the bias of the estimates' own
    minimum remains, and lowers the score. NaN where no draw meets the target.
    """
    fastest = _absent_as_missed(model.draws).min(axis=1, keepdims=True)
    is_known = np.isfinite(model.latent_draws).any(axis=0)
    best_estimate = np.where(is_known, model.estimate, np.inf).min(axis=0)
    is_met = np.isfinite(best_estimate)
    best_draws = np.where(is_met, _absent_as_missed(model.latent_draws).min(axis=1), 0.0)
    bias = best_draws.mean(axis=0) - np.where(is_met, best_estimate, 0.0)
    # A bias above zero would be chance: the mean of minima lies below the minimum of means.
    return np.where(np.isfinite(fastest), fastest - np.minimum(bias, 0.0), np.nan)


def _absent_as_missed(draws: Array) -> Array:
    """A workload that a submission did not run gives no points, as one that it missed."""
    return np.where(np.isnan(draws), np.inf, draws)


def _times_for_ends(table: StudyTable, model: MedianModel, tail: float) -> tuple[Array, Array]:
    """Log times [D, S, W] for the lower and for the upper end (docs/statistics.md, eq. 41)."""
    # A submission near its limit on several workloads would rarely meet, or rarely miss, all of those targets in one
    # draw. So the upper end counts every target that it may have met, and the lower end none that it may have missed.
    met_share = np.isfinite(_absent_as_missed(model.draws)).mean(axis=0)
    latent = _absent_as_missed(model.latent_draws)
    pessimistic = np.where(met_share < 1 - tail, np.inf, latent)
    # Capped at the horizon: a target that may have been met was met by then.
    optimistic = np.where(met_share > tail, np.minimum(latent, table.log_horizon + model.timing_noise), np.inf)
    return pessimistic, optimistic


def _scores(log_times: Array, log_best: Array, tau_max: float) -> Array:
    """Benchmark scores [D, S] of log times [D, S, W] over the best ones [D, 1, W] (docs/statistics.md, eq. 37)."""
    # Where nobody meets the target in a draw, the times that count as met have the ratio 1.
    with np.errstate(invalid="ignore"):
        log_ratios = np.where(np.isnan(log_best), 0.0, log_times - log_best)
    log_ratios = np.where(np.isfinite(log_times), log_ratios, np.inf)
    ratios = np.exp(np.minimum(log_ratios, LARGEST_LOG_RATIO))
    # Contributions above 1, of draws below the best time, are kept: without them a submission that is tied for the best
    # would never reach 1 at the upper end.
    return (np.clip(tau_max - ratios, 0.0, None) / (tau_max - 1)).mean(axis=-1)
