"""From records to a leaderboard: scores, times, their intervals, and notes on how they were made.

`score` is the only entry. It is a chain of steps without side effects: the seconds of every trial and the best trial of
each study (study_results.py), their intervals (uncertainty.py), the table of scores, the table of times, the notes
(board_notes.py). The formulas are in benchmark_score.py; harness/board makes files of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.records.status import SCORED, UNFINISHED, Status
from harness.scoring import benchmark_score, tunability
from harness.scoring.board_notes import board_notes
from harness.scoring.load_records import Records
from harness.scoring.study_results import (
    CELL,
    BoardIntervals,
    StudyResults,
    board_intervals,
    study_results,
    timed_trials,
    with_absent_studies,
)
from harness.scoring.study_table import Array
from harness.scoring.targets import Targets
from harness.scoring.timings import Timings
from harness.scoring.tunability import Tunability
from harness.scoring.uncertainty import Uncertainty

Mode = Literal["default", "algoperf"]
# `baseline` is the name of the baseline in AlgoPerf's records.
USUAL_BASELINES = ("adamw", "baseline")
"""The baseline where none is named: the first of these that has records."""
PROFILE_TAUS = 301
"""Points of the performance profile."""
_SCORE_COLUMNS = [
    "score",
    "score_low",
    "score_high",
    "steps_score",
    "speedup",
    "speedup_low",
    "speedup_high",
    "rank_low",
    "rank_high",
    "examples_score",
    "algoperf_score",
    "speedup_reading",
]


@dataclass
class Leaderboard:
    """What `score` returns."""

    scores: pd.DataFrame
    """A row per submission, best first.

    - submission, score, score_low, score_high: in seconds; steps_score, examples_score: in nominal steps and gradient
      examples; algoperf_score: what --mode algoperf gives;
    - speedup, speedup_low, speedup_high: over the baseline; speedup_reading: see `benchmark_score.speedups`;
    - rank_low, rank_high: see `Uncertainty.ranks`;
    - one column per status with the number of trials, peak_memory_bytes, state_bytes_per_parameter, data_wait_share of
      the seconds, disturbed (trials during which the machine was busy).
    """
    times: pd.DataFrame
    """A row per submission and workload, held-out ones included.

    - held_out; status: reached, missed or not run; counts: whether it counts towards the score;
    - seconds with seconds_low and seconds_high, steps, examples, raw_seconds (the trials' own clocks): medians over
      studies; seconds_on_<machine>: the same on further machines;
    - resolution_seconds, resolution_steps, energy_joules: medians over the best trials of the studies;
    - studies, studies_reached; an absent study that counts as missed is one of them.
    """
    uncertainty: Uncertainty
    """Of `seconds`."""
    steps_uncertainty: Uncertainty
    """Of `steps`."""
    profile: pd.DataFrame
    """The performance profile in seconds: a row per submission, best first, a column per tau."""
    records: Records
    targets: Targets
    mode: Mode
    baseline: str | None
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader."""
    tunability: Tunability | None = None
    """By the same seconds; None where no study has more than one trial."""


def score(
    records: Records,
    *,
    mode: Mode = "default",
    baseline: str | None = None,
    timings: Timings | None = None,
    further_timings: Sequence[Timings] = (),
    mix_machines: bool = False,
    ruleset: str | None = None,
    count_absent_studies: bool = True,
) -> Leaderboard:
    """Score `records`.

    With `timings`, seconds are steps x seconds per step of the timing run plus one-off costs; without, and always in
    mode algoperf, the trials' own clocks. `times` gets a column of seconds for each machine of `further_timings`, and
    for each machine whose clocks were mixed. ruleset: the one whose number of trials per study is checked.
    count_absent_studies: whether a study that a submission lacks counts as one that missed the target, up to the number
    that its ruleset asks for; never in mode algoperf.

    Raises UserError for a baseline without records, and for clocks of several machines without mix_machines.
    """
    is_algoperf = mode == "algoperf"
    targets = records.targets
    baseline = _choose_baseline(baseline, sorted(records.trials["submission"].unique()))
    all_trials = records.trials
    if count_absent_studies and not is_algoperf:
        all_trials = with_absent_studies(all_trials, records.manifests)
    trials = timed_trials(
        all_trials,
        None if is_algoperf else timings,
        refuse_mixed_clocks=not (is_algoperf or mix_machines),
        interpolate=not is_algoperf,
    )
    results = study_results(trials, targets, by_index=is_algoperf)
    recorded = trials[trials["trial"] > 0]
    intervals = board_intervals(results, targets, baseline)
    scores = _score_table(records.trials, results, intervals, targets, mode, baseline)
    times = _time_table(results, intervals, targets)
    board = Leaderboard(
        scores=scores,
        times=times.join(_seconds_by_machine(recorded, timings, further_timings), on=CELL),
        uncertainty=intervals.seconds,
        steps_uncertainty=intervals.steps,
        profile=_profile(results).loc[scores["submission"].tolist()],
        records=records,
        targets=targets,
        mode=mode,
        baseline=baseline,
        tunability=tunability.measure(recorded, results.seconds.min(), targets.base, records.manifests),
    )
    # Last, since they say what is in the rest of the board.
    board.notes = board_notes(board, results, timings, ruleset)
    return board


def _choose_baseline(asked: str | None, names: list[str]) -> str | None:
    if asked is None:
        return next((name for name in USUAL_BASELINES if name in names), None)
    if asked not in names:
        raise UserError(f"--baseline {asked}: no such submission in the records; there are {', '.join(names)}")
    return asked


# ---- the table of scores -------------------------------------------------------------------------------------------


def _score_table(
    all_trials: pd.DataFrame,
    results: StudyResults,
    intervals: BoardIntervals,
    targets: Targets,
    mode: Mode,
    baseline: str | None,
) -> pd.DataFrame:
    """`Leaderboard.scores`. all_trials: `Records.trials`, of which the counts by status are."""
    rule = benchmark_score.algoperf_scores if mode == "algoperf" else benchmark_score.benchmark_scores
    counted, index = results.counted, results.counted["seconds"].index
    has_examples = results.trials["examples"].notna().any()
    score = rule(counted["seconds"].to_numpy())
    score_low, score_high = _extended(intervals.scores.reindex(index), score)
    ranks = intervals.seconds.ranks.reindex(index)
    columns = {
        "score": score,
        "score_low": score_low,
        "score_high": score_high,
        "steps_score": rule(counted["steps"].to_numpy()),
        "examples_score": rule(counted["examples"].to_numpy()) if has_examples else np.nan,
        "algoperf_score": _algoperf_scores(results.trials[results.trials["trial"] > 0], targets),
        "rank_low": ranks["low"],
        "rank_high": ranks["high"],
    }
    scores = pd.DataFrame(columns, index=index).join(_speedups(results, intervals, targets, baseline))
    # By name first: the sort below is stable, and so leaves ties in this order.
    scores = scores[_SCORE_COLUMNS].join(_trial_figures(all_trials)).sort_index()
    scores = scores.sort_values(["score", "speedup", "steps_score"], ascending=False, kind="stable")
    return scores.rename_axis("submission").reset_index()


def _algoperf_scores(trials: pd.DataFrame, targets: Targets) -> pd.Series:
    """The scores under --mode algoperf, to show beside ours."""
    studies = benchmark_score.study_times(trials, "raw_seconds", by_index=True)
    counted = benchmark_score.qualified(benchmark_score.times_to_target(studies, "raw_seconds"), targets)
    return pd.Series(benchmark_score.algoperf_scores(counted.to_numpy()), counted.index)


def _speedups(results: StudyResults, intervals: BoardIntervals, targets: Targets, baseline: str | None) -> pd.DataFrame:
    """By submission: speedup, speedup_low, speedup_high, speedup_reading; NaN without a baseline.

    The rules of the score do not enter: they depend on who else takes part, and a speed-up must not.
    """
    index = results.seconds.index
    if baseline is None:
        return pd.DataFrame(np.nan, index, ["speedup", "speedup_low", "speedup_high", "speedup_reading"])
    times = results.seconds.reindex(columns=list(targets.base))
    # As the time of a cell is the median over its studies, so is the bound that stands in for it (docs/statistics.md,
    # eq. 7a). The intervals take the same.
    details = intervals.details
    trained = details["time"].where(np.isfinite(details["time"]), details["limit"])
    limits = trained.groupby([details[key] for key in CELL]).median().unstack("workload").reindex_like(times)
    values, readings = benchmark_score.speedups(times.to_numpy(), limits.to_numpy(), list(index).index(baseline))
    low, high = _extended(intervals.seconds.speedups.reindex(index), values)
    return pd.DataFrame(
        {"speedup": values, "speedup_low": low, "speedup_high": high, "speedup_reading": readings}, index
    )


def _extended(ends: pd.DataFrame, estimates: Array) -> tuple[Array, Array]:
    """low and high of `ends`, moved to the estimate where it lies outside (docs/statistics.md, eq. 36a). NaN stays.

    The estimate is made of medians over studies, and the interval may be of means.
    """
    low, high = ends["low"].to_numpy(dtype=float), ends["high"].to_numpy(dtype=float)
    is_known = ~np.isnan(estimates)
    low = np.where(is_known, np.minimum(low, estimates), low)
    return low, np.where(is_known, np.maximum(high, estimates), high)


def _trial_figures(trials: pd.DataFrame) -> pd.DataFrame:
    """By submission: the count of its trials by status, and their memory, waiting and disturbances."""
    status = trials["status"].replace(dict.fromkeys(map(str, UNFINISHED), "unfinished"))
    columns = [*map(str, SCORED), "unfinished", str(Status.MISSING), str(Status.INVALID)]
    # Boards are made without pruning; only where there was some is there a column for it.
    columns = [name for name in columns if name != Status.PRUNED or (status == name).any()]
    counts = pd.crosstab(trials["submission"], status).reindex(columns=columns, fill_value=0)
    groups = trials.groupby("submission")
    return counts.assign(
        peak_memory_bytes=groups["peak_memory_bytes"].max(),
        state_bytes_per_parameter=groups["state_bytes_per_parameter"].max(),
        data_wait_share=groups["data_wait_share"].median(),
        disturbed=groups["disturbed"].sum(),
    )


def _profile(results: StudyResults) -> pd.DataFrame:
    """The performance profile: a row per submission, a column per tau."""
    counted = results.counted["seconds"]
    taus = np.linspace(1.0, benchmark_score.TAU_MAX, PROFILE_TAUS)
    return pd.DataFrame(benchmark_score.performance_profile(counted.to_numpy(), taus), counted.index, taus)


# ---- the table of times --------------------------------------------------------------------------------------------


def _time_table(results: StudyResults, intervals: BoardIntervals, targets: Targets) -> pd.DataFrame:
    """`Leaderboard.times` without the seconds on further machines."""
    cells = pd.MultiIndex.from_product([results.seconds.index, targets.scored], names=CELL)
    medians = {unit: table.stack(future_stack=True).reindex(cells) for unit, table in results.medians.items()}
    seconds = medians["seconds"]
    is_held_out = cells.get_level_values("workload").isin(targets.held_out)
    counted = results.counted["seconds"].stack(future_stack=True).reindex(cells)
    # A missed time is no estimate, and its interval stays as it is.
    estimates = seconds.where(np.isfinite(seconds)).to_numpy(dtype=float)
    low, high = _extended(intervals.seconds.times.set_index(CELL).reindex(cells), estimates)
    table = pd.DataFrame(
        {
            "held_out": is_held_out,
            "status": np.where(seconds.notna(), np.where(np.isfinite(seconds), "reached", "missed"), "not run"),
            "counts": np.isfinite(counted.fillna(np.inf)) | (is_held_out & np.isfinite(seconds)),
            "seconds": seconds,
            "seconds_low": low,
            "seconds_high": high,
            **{unit: values for unit, values in medians.items() if unit != "seconds"},
        },
        index=cells,
    )
    return table.join(_study_figures(results, cells)).reset_index()


def _study_figures(results: StudyResults, cells: pd.MultiIndex) -> pd.DataFrame:
    """By cell: medians over the best trials of its studies, and how many studies there are and met the target."""
    trials, studies = results.trials, results.studies["seconds"]
    measured = ["resolution_seconds", "resolution_steps"]
    if trials["energy_joules"].notna().any():
        measured.append("energy_joules")
    figures = trials.loc[studies["row"]].groupby(CELL)[measured].median().reindex(cells)
    is_reached = np.isfinite(studies["seconds"]).groupby([studies[key] for key in CELL])
    figures["studies"] = is_reached.size().reindex(cells).fillna(0).astype(int)
    figures["studies_reached"] = is_reached.sum().reindex(cells).fillna(0).astype(int)
    return figures


def _seconds_by_machine(trials: pd.DataFrame, timings: Timings | None, further: Sequence[Timings]) -> pd.DataFrame:
    """Seconds to target by cell, a column per machine beside the one of the scores.

    The machines are those of the further timing runs; without a timing run, those whose clocks were mixed.
    """

    def column(of_machine: pd.DataFrame, unit: str) -> pd.Series:
        """The medians over studies by cell, of trials of one machine."""
        table = benchmark_score.times_to_target(benchmark_score.study_times(of_machine, unit), unit)
        return pd.Series(table.stack(future_stack=True))

    if timings is not None:
        untimed = trials.drop(columns=["seconds", "resolution", "limit", "budget"])
        columns = {run.machine: column(run.apply(untimed), "seconds") for run in further}
    else:
        machines = trials["machine"].dropna().unique()
        columns = {m: column(trials[trials["machine"] == m], "seconds") for m in machines if len(machines) > 1}
    if not columns:
        return pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=CELL))
    return pd.DataFrame({f"seconds_on_{machine}": values for machine, values in columns.items()})
