"""How sure a leaderboard is: intervals for times, scores and speed-ups, and which differences are real.

The intervals come from one of two models (harness/scoring/interval_models.py), by the number of studies per cell:

- the **t model** below ten, with one variance for the whole table and censored misses;
- the **bootstrap** from ten on, with the cells' means in comparisons;
- **none** below four pooled degrees of freedom: every interval is NaN.

Derivations: docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.scoring.benchmark_score import TAU_MAX
from harness.scoring.comparisons import Comparisons, compare, pair_workloads, rank_ranges, speedup_intervals
from harness.scoring.interval_models import DRAWS, MedianModel, bootstrap, t_model
from harness.scoring.pooled_noise import MIN_DOF, pooled_noise
from harness.scoring.score_intervals import score_intervals
from harness.scoring.study_table import StudyTable, tabulate

BOOTSTRAP_STUDIES = 10
"""Studies that every cell needs before the bootstrap replaces the t model."""


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
    beyond the resolution of times that are those of evaluations; the verdict follows p_holm.
    """
    pairs_by_workload: pd.DataFrame
    """The same for every workload by itself; Holm's correction is over all rows."""
    ranks: pd.DataFrame
    """By submission: low = 1 + number of submissions shown to be faster, high = S - number shown to be slower."""
    detectable: float
    """Smallest ratio of times between two submissions, over all their workloads, that a single comparison at `level`,
    without Holm's correction, detects with 80% power; for the pair of median precision. NaN without intervals."""


def estimate(
    studies: pd.DataFrame,
    *,
    baseline: str | None,
    tau_max: float = TAU_MAX,
    level: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> Uncertainty:
    """Intervals and comparisons for a table of studies.

    `studies` has a row per (submission, workload, study) with the study's best trial, all in one unit of time:

    - `time` to the target; infinite: missed;
    - `limit`, how long it trained; read for misses only;
    - `resolution`, time from the evaluation before to the one at the target; NaN: unknown;
    - optionally `interpolated`, whether `time` is the crossing interpolated between the two; otherwise it is that of
      the evaluation, and a difference counts only as far as it exceeds the resolution;
    - optionally `timing_error`, the relative error that all studies of a cell share, and `timing_dof`, its degrees of
      freedom;
    - optionally `budget`, how long it could have trained; NaN: unknown. It is read where every study of a cell met the
      target; without it the cell's median is taken to meet it too.

    Base workloads only. draws: how many draws of the log medians the intervals of scores and of censored times use. The
    order of rows and the submissions' names change nothing; the unit of time changes `times` alone.
    """
    table = tabulate(studies)
    choice = _choose_model(table, level, draws, np.random.default_rng(seed))
    model = choice.model
    overall, by_workload = _compare_all(table, choice, level)
    index = pd.Index(table.submissions, name="submission")
    return Uncertainty(
        method=choice.method,
        sigma=choice.sigma,
        dof=choice.dof,
        times=_time_intervals(table, model),
        scores=score_intervals(table, model, tau_max, level, index),
        speedups=speedup_intervals(table, model, baseline, level, index),
        pairs=overall.pairs,
        pairs_by_workload=by_workload,
        ranks=rank_ranges(overall, index),
        detectable=overall.detectable,
    )


@dataclass(frozen=True)
class _ModelChoice:
    """The model of a table, or None and why there is none."""

    model: MedianModel | None
    sigma: float
    dof: float
    method: str
    """For the reader of a board."""
    why_none: str = ""


def _choose_model(table: StudyTable, level: float, draws: int, rng: np.random.Generator) -> _ModelChoice:
    """The model that the number of studies allows, and the sentence about it."""
    noise = pooled_noise(table)
    sigma, dof, pairing = noise.sigma, noise.dof, noise.pairing
    counts = table.study_count[table.study_count > 0]
    # By the smallest cell, since one model has to serve comparisons between any two cells.
    if counts.size and counts.min() >= BOOTSTRAP_STUDIES:
        model = bootstrap(table, pairing.correlation, level, rng, draws)
        name = f"Bootstrap of the median, smoothed, {int(counts.min())} or more studies per cell"
    elif dof >= MIN_DOF:
        model, posterior = t_model(table, pairing, level, rng, draws)
        # The hits alone decide which model is used; the posterior's also hold what the misses tell.
        sigma, dof = posterior.sigma, posterior.dof
        name = "T model on log time, variance pooled over submissions and workloads, misses censored at their limit"
    else:
        why_none = "no studies" if not counts.size else "a single study" if counts.max() == 1 else "too few studies"
        method = f"No intervals: {why_none} ({dof:g} pooled degrees of freedom, {MIN_DOF} are needed)."
        return _ModelChoice(None, float(sigma if dof > 0 else np.nan), dof, method, why_none)
    method = f"{name}; sigma of log time {sigma:.3g} with {dof:.3g} degrees of freedom; {pairing.sentence}."
    return _ModelChoice(model, float(sigma), float(dof), method)


def _compare_all(table: StudyTable, choice: _ModelChoice, level: float) -> tuple[Comparisons, pd.DataFrame]:
    """All pairs over all their workloads, and all pairs on every workload by itself."""
    first, second = np.triu_indices(len(table.submissions), 1)
    pairs, workloads = len(first), len(table.workloads)
    together = pair_workloads(table, first, second, np.ones((pairs, workloads), dtype=bool))
    # A table of its own, with its own correction by Holm: `compare` corrects over all rows that it is given.
    single = np.tile(np.eye(workloads, dtype=bool), (pairs, 1))
    apart = pair_workloads(table, np.repeat(first, workloads), np.repeat(second, workloads), single)
    overall, by_workload = (
        compare(table, choice.model, chosen, level, choice.why_none) for chosen in (together, apart)
    )
    by_workload.pairs.insert(2, "workload", np.tile(np.array(table.workloads, dtype=object), pairs))
    return overall, by_workload.pairs


def _time_intervals(table: StudyTable, model: MedianModel | None) -> pd.DataFrame:
    """Intervals of the cells that have studies; NaN without a model."""
    s, w = np.nonzero(table.study_count > 0)
    unknown = np.full(len(s), np.nan)
    return pd.DataFrame(
        {
            "submission": np.array(table.submissions, dtype=object)[s],
            "workload": np.array(table.workloads, dtype=object)[w],
            "low": np.exp(model.low[s, w]) if model else unknown,
            "high": np.exp(model.high[s, w]) if model else unknown,
        }
    )
