"""Tunability: how good a submission is after k trials of a study, and how wide the range of points is that works.

The time of the best of k trials is infinite when all k miss, and so is its expectation as soon as one trial can miss.
These three figures stay finite when trials miss:

- **reached**, the probability that at least one of k trials meets the target;
- **score**, the expectation of what the best of k contributes to the benchmark score: (tau_max - r) / (tau_max - 1)
  within [0, 1], with r its time over the workload's fastest on the board, and 0 for a miss; what the board ranks by;
- **seconds**, the median time of the best of k, infinite only where fewer than half of the draws meet the target.

All three are over the orders in which the trials of a study could have come: every k of its n trials are equally
likely to have been the first k. Reached and score are then U-statistics, unbiased for the expectation over points drawn
anew: the i-th best of n values is the best of k drawn without replacement with probability C(n - i, k - 1) / C(n, k)
(Tang et al. 2020, "Showing Your Work Doesn't Always Work", arXiv:2004.13453, on Dodge et al. 2019, "Show Your Work",
arXiv:1909.03004). It needs k <= n: beyond the trials of a study nothing is estimated. Points are quasi-random, so k
trials cover slightly more than k independent ones. Derivations: docs/statistics.md, section 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from harness.config.search_space import Dimension, parse_search_space
from harness.errors import UserError
from harness.records.manifest import Manifest
from harness.records.status import UNFINISHED, Status
from harness.scoring.benchmark_score import TAU_MAX

Array = NDArray[np.float64]

DRAWS = 2000
"""Of the bootstrap of the score; 50 lie beyond each end of a 95% interval."""
MIN_TRIALS = 8
"""Trials on a workload below which the score has no interval: fewer cannot be resampled sensibly."""
CELL = ["submission", "workload"]
STUDY = [*CELL, "study"]


@dataclass
class Tunability:
    """What `measure` returns."""

    cells: pd.DataFrame
    """submission, workload, k, studies, trials (of all studies), trials_reached, seconds, and reached and score, each
    with _low and _high at 95%. k goes to the number of trials of the cell's smallest study.

    The interval of reached is exact for independent trials (Clopper & Pearson 1934, of a single trial's chance). That
    of the score is a bootstrap over all trials of the cell; it cannot know of points better than the best that was
    tried, and where studies repeat the same points, as AlgoPerf's do, both are too narrow.
    """
    overall: pd.DataFrame
    """submission, k, score, score_low, score_high: the mean over the base workloads; one that was not run gives 0. As
    the rules for held-out workloads leave no time of the best of k, they do not enter."""
    bands: pd.DataFrame
    """submission, workload, hyperparameter, low and high of the search space, reached_low and reached_high of the
    points that met the target, width: from reached_low to reached_high as a share of the range, on the range's own
    scale (of choices: the share that met it). m points, evenly in a band, show (m - 1) / (m + 1) of its width on
    average."""
    left_out: list[str] = field(default_factory=list)
    """Sentences for the reader about studies that do not enter."""


def best_of(values: Array) -> Array:
    """Expected largest of k of the n values, drawn without replacement, for k = 1..n: float [..., n] -> [..., n].

    docs/statistics.md, eq. 46.
    """
    return np.asarray(-np.sort(-values, axis=-1) @ _weights(values.shape[-1]).T)


def _weights(n: int) -> Array:
    """[k, i], both from 1: the probability that the i-th best of n is the best of k of them (eq. 45)."""
    k, i = np.arange(1, n + 1)[:, None], np.arange(1, n + 1)[None, :]
    # Without replacement. Drawing with replacement, as Dodge et al. 2019 do, underestimates the best of k.
    return np.asarray(special.comb(n - i, k - 1) / special.comb(n, k))


def measure(
    trials: pd.DataFrame, fastest: pd.Series, base: tuple[str, ...], manifests: dict[int, Manifest], seed: int = 0
) -> Tunability | None:
    """Tunability of every submission on every workload; None where no study has more than one trial.

    trials: a row per trial as in `load_records.Records`, `seconds` NaN or infinite where the target was missed.
    fastest: seconds of the fastest submission by workload. base: the workloads that the score is a mean of. manifests:
    by row label of `trials`, from which search spaces and points are read.
    """
    trials, left_out = _leave_out_pruned(trials)
    if trials.empty or trials.groupby(STUDY).size().max() < 2:
        return None
    rng = np.random.default_rng(seed)
    cells, draws = [], {}
    for (submission, workload), group in trials.groupby(CELL):
        seconds = [of_study.to_numpy(float) for _, of_study in group.groupby("study")["seconds"]]
        times = [np.where(np.isfinite(s), s, np.inf) for s in seconds]
        cell, draws[submission, workload] = _measure_cell(times, float(fastest.get(workload, np.inf)), rng)
        cell.insert(0, "submission", str(submission))
        cell.insert(1, "workload", str(workload))
        cells.append(cell)
    table = pd.concat(cells, ignore_index=True)
    bands = pd.DataFrame(_bands(trials, manifests), columns=_BAND_COLUMNS)
    return Tunability(table, _overall(table, draws, base), bands, left_out)


def _leave_out_pruned(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials that have ended, of studies without pruned ones, and a sentence about the others."""
    # Whole studies, not pruned trials alone: it is unknown whether such a trial would have met its target, and trials
    # are pruned for being bad, so those that are left are too good a sample.
    in_pruned_study = trials["status"].eq(Status.PRUNED).groupby([trials[key] for key in STUDY]).transform("any")
    left_out = []
    if in_pruned_study.any():
        count = len(trials.loc[in_pruned_study, STUDY].drop_duplicates())
        left_out.append(
            f"Tunability leaves out {count} studies with pruned trials: how those would have ended is unknown."
        )
    return trials[~in_pruned_study & ~trials["status"].isin(UNFINISHED)], left_out


def _measure_cell(times: list[Array], fastest: float, rng: np.random.Generator) -> tuple[pd.DataFrame, Array]:
    """The rows of a cell from the times of each study, one per k, and bootstrap draws of its score [draws, k]."""
    all_times = np.concatenate(times)
    k = np.arange(1, min(map(len, times)) + 1)
    hits = int(np.isfinite(all_times).sum())
    reached = _mean_best_of([np.isfinite(t).astype(float) for t in times])
    score = _mean_best_of([_contribution(t, fastest) for t in times])
    # docs/statistics.md, eq. 48.
    single = stats.binomtest(hits, len(all_times)).proportion_ci(0.95, method="exact")

    resampled = rng.choice(_contribution(all_times, fastest), (DRAWS, len(all_times)))
    draws = best_of(resampled)[:, : len(k)]
    if len(all_times) < MIN_TRIALS:
        draws = np.full_like(draws, np.nan)
    score_low, score_high = np.quantile(draws, [0.025, 0.975], axis=0)
    cell = pd.DataFrame(
        {
            "k": k,
            "studies": len(times),
            "trials": len(all_times),
            "trials_reached": hits,
            "reached": reached,
            # The interval is of k independent trials. Those of a study are drawn without replacement and meet the
            # target a little sooner, so the estimate may lie outside; the interval is then extended to it.
            "reached_low": np.minimum(reached, 1 - (1 - single.low) ** k),
            "reached_high": np.maximum(reached, 1 - (1 - single.high) ** k),
            "seconds": [_median_best(times, number) for number in k.tolist()],
            "score": score,
            "score_low": np.minimum(score, score_low),
            "score_high": np.maximum(score, score_high),
        }
    )
    return cell, draws


def _mean_best_of(studies: list[Array]) -> Array:
    """`best_of`, averaged over studies, for the k that all of them have: float [k]."""
    largest_k = min(map(len, studies))
    return np.asarray(np.mean([best_of(values)[:largest_k] for values in studies], axis=0))


def _contribution(times: Array, fastest: float) -> Array:
    """What each time gives to the score of its workload, in [0, 1] (docs/statistics.md, eq. 5)."""
    # Nobody met the target, so there is no time to compare with.
    if not np.isfinite(fastest):
        return np.zeros(len(times))
    return np.asarray(np.clip((TAU_MAX - times / fastest) / (TAU_MAX - 1), 0.0, 1.0))


def _median_best(times: list[Array], k: int) -> float:
    """Smallest time that the best of k is at most, in half of the draws of a study and of k of its trials (eq. 47)."""
    all_times = np.concatenate([np.sort(t) for t in times])
    weights = np.concatenate([_weights(len(t))[k - 1] / len(times) for t in times])
    order = np.argsort(all_times, kind="stable")
    # Weights that add up to one half exactly may miss it by a rounding error.
    return float(all_times[order][np.searchsorted(weights[order].cumsum(), 0.5 - 1e-12)])


def _overall(cells: pd.DataFrame, draws: dict[Any, Array], base: tuple[str, ...]) -> pd.DataFrame:
    """`Tunability.overall`, for the k that all workloads of a submission have."""
    frames = []
    for submission, group in cells[cells["workload"].isin(base)].groupby("submission"):
        largest_k = int(group.groupby("workload")["k"].max().min())
        # A sum over what was run, divided by all base workloads: one that was not run gives 0.
        score = group[group["k"] <= largest_k].groupby("k")["score"].sum() / len(base)
        drawn = sum(draws[submission, workload][:, :largest_k] for workload in group["workload"].unique()) / len(base)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        frames.append(
            pd.DataFrame(
                {
                    "submission": submission,
                    "k": score.index,
                    "score": score.to_numpy(),
                    "score_low": np.minimum(score, low),
                    "score_high": np.maximum(score, high),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


# ---- bands of hyperparameters ------------------------------------------------------------------------------------

_BAND_COLUMNS = ["submission", "workload", "hyperparameter", "low", "high", "reached_low", "reached_high", "width"]


def _bands(trials: pd.DataFrame, manifests: dict[int, Manifest]) -> Iterator[tuple[Any, ...]]:
    """The rows of `Tunability.bands`."""
    for (submission, workload), group in trials.groupby(CELL):
        optimizers = {i: manifests[i].optimizer for i in group.index if i in manifests}
        space = next((o["search_space"] for o in optimizers.values() if o.get("search_space")), None)
        if space is None:
            continue
        try:
            dimensions = parse_search_space(space).dimensions
        except UserError:
            # A record of another version of the harness may have a space that this one cannot parse.
            continue
        met = group.index[np.isfinite(group["seconds"])]
        for dimension in dimensions:
            values = [_value_at(optimizers[i].get("recipe"), dimension.path) for i in met if i in optimizers]
            row = _band(dimension, [value for value in values if value is not None])
            if row is not None:
                yield submission, workload, dimension.name, *row


def _value_at(recipe: Any, path: tuple[str | int, ...]) -> Any:
    """The value of a recipe at a path of keys and indices, None where it has none."""
    for part in path:
        try:
            recipe = recipe[part]
        except (KeyError, IndexError, TypeError):
            return None
    return recipe


def _band(dimension: Dimension, reached: list[Any]) -> tuple[Any, ...] | None:
    """low, high, reached_low, reached_high, width; None for what is not a number or never varied.

    reached: the values of the points that met the target.
    """
    # A list may fix one of its numbers, which is then a dimension with a single choice.
    if len(dimension.values) < 2 or not all(isinstance(value, int | float) for value in [*dimension.values, *reached]):
        return None
    ends = (min(dimension.values), max(dimension.values))
    if not reached:
        return *ends, np.nan, np.nan, 0.0
    if dimension.kind == "choices":
        width = len(set(reached) & set(dimension.values)) / len(dimension.values)
    else:
        # docs/statistics.md, eq. 49: on average an underestimate of the band.
        positions = [dimension.position(value) for value in reached]
        width = max(positions) - min(positions)
    return *ends, min(reached), max(reached), width
