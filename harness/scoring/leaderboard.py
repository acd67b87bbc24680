"""From records to a leaderboard: scores, times, intervals, and in plain words what was done and what was not.

`score` is the only entry. The formulas are in harness/scoring.py, the intervals in harness/uncertainty.py, the files in
harness/publish.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.records.status import BROKEN_DOWN, SCORED, UNFINISHED, UNUSABLE, Status
from harness.scoring import benchmark_score, tunability, uncertainty
from harness.scoring.load_records import Records
from harness.scoring.targets import Targets
from harness.scoring.timings import Timings
from harness.scoring.tunability import Tunability
from harness.scoring.uncertainty import Uncertainty

Mode = Literal["default", "algoperf"]
USUAL_BASELINES = ("adamw", "baseline")
TRIALS_PER_STUDY = {"external": 5, "self_tuning": 1, "quick": 1}


@dataclass
class Leaderboard:
    scores: pd.DataFrame
    """Best first: submission, score, score_low, score_high, steps_score, examples_score, algoperf_score, speedup,
    speedup_low, speedup_high, speedup_reading, rank_low, rank_high, the count of trials by status, peak_memory_bytes,
    state_bytes_per_parameter, data_wait_share, disturbed."""
    times: pd.DataFrame
    """A row per submission and workload: status, counts (towards the score), seconds and their interval, steps,
    examples, raw_seconds (the trials' own clocks), resolutions, studies, studies_reached."""
    uncertainty: Uncertainty
    """Of `seconds`."""
    steps_uncertainty: Uncertainty
    profile: pd.DataFrame
    """Row per submission, column per tau."""
    records: Records
    targets: Targets
    mode: Mode
    baseline: str | None
    notes: list[str] = field(default_factory=list)
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
) -> Leaderboard:
    """Score `records`. With `timings`, seconds are steps x seconds per step of the timing run plus one-off costs;
    without, and always in mode algoperf, the trials' own clocks. `times` gets a column of seconds for each machine of
    `further_timings`, and for each that clocks were mixed of.

    UserError for a baseline that is not there, and for clocks of several machines without mix_machines.
    """
    targets, algoperf = records.targets, mode == "algoperf"
    trials = records.trials
    names = sorted(trials["submission"].unique())
    baseline = _baseline(baseline, names)
    taken = trials[trials["status"] != "duplicate"].rename(columns={"seconds": "raw_seconds"})
    if timings is None or algoperf:
        taken = taken.assign(
            seconds=taken["raw_seconds"], resolution=taken["resolution_seconds"], limit=taken["limit_seconds"],
            budget=taken.groupby("workload")["limit_seconds"].transform("max"),
        )  # fmt: skip
        if not (algoperf or mix_machines):
            _refuse_mixed_machines(taken)
    else:
        taken = timings.apply(taken)
    by_time = benchmark_score.study_times(taken, "seconds", by_index=algoperf)
    tables = {"seconds": benchmark_score.times_to_target(by_time, "seconds")}
    for column in ("steps", "examples", "raw_seconds"):
        studies = benchmark_score.study_times(taken, column, by_index=algoperf)
        tables[column] = benchmark_score.times_to_target(studies, column)
        if column == "steps":
            by_steps = studies
    counted = {column: benchmark_score.qualified(table, targets) for column, table in tables.items()}
    rule = benchmark_score.algoperf_scores if algoperf else benchmark_score.benchmark_scores
    scores = pd.DataFrame({"score": rule(counted["seconds"].to_numpy())}, index=counted["seconds"].index)
    scores["steps_score"] = rule(counted["steps"].to_numpy())
    recorded = taken["examples"].notna().any()
    scores["examples_score"] = rule(counted["examples"].to_numpy()) if recorded else np.nan
    scores["algoperf_score"] = _algoperf(taken, targets)

    details = _study_details(taken, by_time, "seconds", targets)
    sure = uncertainty.estimate(details, baseline=baseline)
    sure_scores = sure.scores
    void = benchmark_score.disqualified(tables["seconds"], targets)
    cells = {(s, w) for w in void for s in void.index[void[w]]}
    if cells:
        # What fails on a held-out workload is never solved; to an interval of the score it is a miss beyond all limits.
        out = pd.MultiIndex.from_frame(details[["submission", "workload"]]).isin(cells)
        missed = details.assign(
            time=details["time"].mask(out, np.inf),
            limit=details["limit"].mask(out, 10 * benchmark_score.TAU_MAX * details["limit"].max()),
            resolution=details["resolution"].mask(out),
        )
        sure_scores = uncertainty.estimate(missed, baseline=baseline).scores
    steps_sure = uncertainty.estimate(_study_details(taken, by_steps, "steps", targets), baseline=baseline)

    scores[["score_low", "score_high"]] = sure_scores.reindex(scores.index)[["low", "high"]].to_numpy()
    scores[["rank_low", "rank_high"]] = sure.ranks.reindex(scores.index)[["low", "high"]].to_numpy()
    if baseline is not None:
        # Without the rules of the score: they depend on who else takes part, and a speed-up must not.
        base = tables["seconds"].reindex(columns=list(targets.base))
        limits = details.groupby(["submission", "workload"])["limit"].median().unstack("workload").reindex_like(base)
        values, reading = benchmark_score.speedups(base.to_numpy(), limits.to_numpy(), list(base.index).index(baseline))
        scores["speedup"], scores["speedup_reading"] = values, reading
        scores[["speedup_low", "speedup_high"]] = sure.speedups.reindex(scores.index)[["low", "high"]].to_numpy()
    else:
        scores[["speedup", "speedup_low", "speedup_high", "speedup_reading"]] = np.nan
    scores = scores.join(_per_submission(trials)).sort_index()
    scores = scores.sort_values(["score", "speedup", "steps_score"], ascending=False, kind="stable")
    order = [f"score{end}" for end in ("", "_low", "_high")] + ["steps_score"]
    order += [f"speedup{end}" for end in ("", "_low", "_high")] + ["rank_low", "rank_high"]
    scores = scores[order + [column for column in scores if column not in order]]
    times = _times(taken, by_time, tables, counted, sure, targets)
    times = times.join(_by_machine(taken, timings, further_timings), on=["submission", "workload"])
    taus = np.linspace(1.0, benchmark_score.TAU_MAX, 301)
    profile = pd.DataFrame(
        benchmark_score.performance_profile(counted["seconds"].to_numpy(), taus), counted["seconds"].index, taus
    )
    board = Leaderboard(
        scores.rename_axis("submission").reset_index(), times, sure, steps_sure, profile.loc[scores.index], records,
        targets, mode, baseline,
    )  # fmt: skip
    board.tunability = tunability.measure(taken, tables["seconds"].min(), targets.base, records.manifests)
    board.notes = _notes(board, taken, tables["seconds"], timings, ruleset)
    return board


def _refuse_mixed_machines(taken: pd.DataFrame) -> None:
    machines = sorted(taken["machine"].dropna().unique())
    if len(machines) > 1:
        raise UserError(
            f"the records are of {len(machines)} machines ({', '.join(machines)}), whose clocks do not compare; give "
            "--timing FILE for seconds of one machine (scripts/timing.py makes it), or --mix-machines to take the "
            "clocks as they are, with a column of seconds for each machine"
        )


def _by_machine(taken: pd.DataFrame, timings: Timings | None, further: Sequence[Timings]) -> pd.DataFrame:
    """Seconds to target by (submission, workload), a column per machine beside the one of the scores: of the further
    timing runs, or of the trials' own clocks where these are mixed."""

    def column(trials: pd.DataFrame, seconds: str) -> pd.Series:
        table = benchmark_score.times_to_target(benchmark_score.study_times(trials, seconds), seconds)
        return pd.Series(table.stack(future_stack=True))

    if timings is not None:
        plain = taken.drop(columns=["seconds", "resolution", "limit", "budget"])
        columns = {one.machine: column(one.apply(plain), "seconds") for one in further}
    else:
        machines = taken["machine"].dropna().unique()
        columns = {m: column(taken[taken["machine"] == m], "raw_seconds") for m in machines if len(machines) > 1}
    frame = pd.DataFrame({f"seconds_on_{machine}": values for machine, values in columns.items()})
    if not columns:
        frame.index = pd.MultiIndex.from_arrays([[], []], names=["submission", "workload"])
    return frame


def _baseline(asked: str | None, names: list[str]) -> str | None:
    if asked is None:
        return next((name for name in USUAL_BASELINES if name in names), None)
    if asked not in names:
        raise UserError(f"--baseline {asked}: no such submission in the records; there are {', '.join(names)}")
    return asked


def _algoperf(taken: pd.DataFrame, targets: Targets) -> pd.Series:
    """The score under --mode algoperf, to show beside ours."""
    studies = benchmark_score.study_times(taken, "raw_seconds", by_index=True)
    table = benchmark_score.qualified(benchmark_score.times_to_target(studies, "raw_seconds"), targets)
    return pd.Series(benchmark_score.algoperf_scores(table.to_numpy()), table.index)


def _study_details(taken: pd.DataFrame, studies: pd.DataFrame, column: str, targets: Targets) -> pd.DataFrame:
    """What uncertainty.estimate asks for: of the base workloads, a row per study."""
    resolution, limit = ("resolution_steps", "limit_steps") if column == "steps" else ("resolution", "limit")
    longest = taken.groupby("workload")[limit].transform("max") if column == "steps" else taken["budget"]
    # A trial that broke down had no chance after that, so it does not shorten how long its study has tried; where all
    # broke down, the study failed for as long as anyone tried.
    tried = taken[limit].where(~taken["status"].isin(BROKEN_DOWN))
    shortest = tried.groupby([taken["submission"], taken["workload"], taken["study"]]).min().rename("limit")
    table = studies.rename(columns={column: "time"}).assign(resolution=taken.loc[studies["row"], resolution].to_numpy())
    table["budget"] = longest.loc[table["row"]].to_numpy()
    table = table.join(shortest, on=["submission", "workload", "study"]).drop(columns="row")
    table["limit"] = table["limit"].fillna(table["budget"])
    return table[table["workload"].isin(targets.base)].reset_index(drop=True)


def _per_submission(trials: pd.DataFrame) -> pd.DataFrame:
    status = trials["status"].replace(dict.fromkeys(map(str, UNFINISHED), "unfinished"))
    # Boards are made without pruning; only where there was some, there is a column for it.
    all_shown = [*map(str, SCORED), "unfinished", str(Status.MISSING), str(Status.INVALID)]
    shown = [name for name in all_shown if name != Status.PRUNED or (status == name).any()]
    counts = pd.crosstab(trials["submission"], status).reindex(columns=shown, fill_value=0)
    groups = trials.groupby("submission")
    return counts.assign(
        peak_memory_bytes=groups["peak_memory_bytes"].max(),
        state_bytes_per_parameter=groups["state_bytes_per_parameter"].max(),
        data_wait_share=groups["data_wait_share"].median(),
        disturbed=groups["disturbed"].sum(),
    )


def _times(
    taken: pd.DataFrame,
    studies: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    counted: dict[str, pd.DataFrame],
    sure: Uncertainty,
    targets: Targets,
) -> pd.DataFrame:
    keys = ["submission", "workload"]
    frame = pd.DataFrame({column: table.stack(future_stack=True) for column, table in tables.items()})
    frame = frame.reindex(pd.MultiIndex.from_product([tables["seconds"].index, targets.scored], names=keys))
    run = frame["seconds"].notna()
    counts = counted["seconds"].stack(future_stack=True).reindex(frame.index)
    reached = np.isfinite(studies["seconds"]).groupby([studies["submission"], studies["workload"]]).agg(["size", "sum"])
    known = ["resolution_seconds", "resolution_steps"]
    if taken["energy_joules"].notna().any():
        known.append("energy_joules")
    best = taken.loc[studies["row"]].groupby(keys)[known].median()
    frame.insert(0, "held_out", frame.index.get_level_values("workload").isin(targets.held_out))
    status = np.where(np.isfinite(frame["seconds"]), "reached", "missed")
    frame.insert(1, "status", np.where(run, status, "not run"))
    frame.insert(2, "counts", np.isfinite(counts.fillna(np.inf)) | (frame["held_out"] & np.isfinite(frame["seconds"])))
    if len(sure.times):
        frame = frame.join(sure.times.set_index(keys)[["low", "high"]].add_prefix("seconds_"))
    else:
        frame[["seconds_low", "seconds_high"]] = np.nan
    frame = frame.join(best)
    frame["studies"] = reached["size"].reindex(frame.index).fillna(0).astype(int)
    frame["studies_reached"] = reached["sum"].reindex(frame.index).fillna(0).astype(int)
    first = [
        "held_out",
        "status",
        "counts",
        "seconds",
        "seconds_low",
        "seconds_high",
        "steps",
        "examples",
        "raw_seconds",
    ]
    return frame[first + [column for column in frame if column not in first]].reset_index()


def _notes(
    board: Leaderboard, taken: pd.DataFrame, times: pd.DataFrame, timings: Timings | None, ruleset: str | None
) -> list[str]:
    notes = [board.uncertainty.method]
    targets, scores = board.targets, board.scores
    if np.isfinite(board.uncertainty.detectable):
        percent = 100 * (board.uncertainty.detectable - 1)
        notes.append(f"The smallest difference in time that this table could have detected is {percent:.0f}%.")
    if board.mode == "algoperf":
        notes.append(
            "Scored as AlgoPerf does: the best trial of a study is the one with the smallest evaluation index at the "
            "target, the score a trapezoid over 100 points, the seconds each trial's own clock, the steps the "
            "global_step that each submission's log states."
        )
    else:
        differing = scores[(scores["score"] - scores["algoperf_score"]).abs() > 5e-5]
        if len(differing):
            listed = ", ".join(f"{r.submission} {r.algoperf_score:.4f}" for r in differing.itertuples())
            notes.append(f"Under AlgoPerf's own rule (--mode algoperf) these scores differ: {listed}.")
    if timings is not None and board.mode == "default":
        notes.append(timings.sentence)
    elif board.mode == "default":
        machines = taken["machine"].dropna().unique()
        what = f"on {len(machines)} kinds of machine" if len(machines) > 1 else "one after the other"
        notes.append(f"Seconds are the clocks of trials that ran {what}; scripts/timing.py makes seconds that compare.")
    notes += _held_out_notes(times, targets)
    left_out = benchmark_score.unscored_held_out(times, targets)
    if left_out:
        notes.append(f"No submission ran {', '.join(left_out)}; these held-out workloads disqualify nobody.")
    nobody = [w for w in targets.base if w not in times or not np.isfinite(times[w]).any()]
    if nobody:
        notes.append(f"No submission solved {', '.join(nobody)}; they count in the score of all.")
    pruned = int((taken["status"] == "pruned").sum())
    if pruned:
        notes.append(
            f"{pruned} trials were stopped early by pruning= and count as misses of the length they had; "
            "docs/pruning.md says what that changes. A committed board has none."
        )
    if board.tunability is not None:
        notes += board.tunability.left_out
    notes += _study_notes(taken, ruleset)
    if board.baseline is None:
        notes.append("No baseline was named (--baseline), so there is no speed-up.")
    unusable = int(board.records.trials["status"].isin([*UNUSABLE, *UNFINISHED]).sum())
    if unusable or board.records.problems:
        remarks = len(board.records.problems)
        notes.append(f"{unusable} trials are missing, unfinished or refused; {remarks} remarks on reading.")
    return notes


def _held_out_notes(times: pd.DataFrame, targets: Targets) -> list[str]:
    run = [workload for workload in targets.held_out if workload in times]
    if not run:
        return []
    notes = [
        f"Held out: {', '.join(run)}. Each is a workload with one thing changed, run to see who over-fitted to that "
        "workload. It gives no points of its own; the workload counts only for submissions that also reach the target "
        f"of the variant, within {benchmark_score.TAU_MAX:g} times the fastest there."
    ]
    void = benchmark_score.disqualified(times, targets) & np.isfinite(times.reindex(columns=list(targets.base)))
    cells = [f"{submission} on {workload}" for workload in void for submission in void.index[void[workload]]]
    if cells:
        more = f" and {len(cells) - 8} more" if len(cells) > 8 else ""
        notes.append(f"Solved, but not counted for want of a held-out variant: {', '.join(cells[:8])}{more}.")
    return notes


def _study_notes(taken: pd.DataFrame, ruleset: str | None) -> list[str]:
    notes = []
    counts = taken.groupby(["submission", "workload"])["study"].nunique()
    fewer = counts[counts < counts.max()].reset_index()
    if len(fewer):
        listed = ", ".join(f"{row.submission} on {row.workload} {row.study}" for row in fewer.head(8).itertuples())
        more = f" and {len(fewer) - 8} more" if len(fewer) > 8 else ""
        notes.append(f"Fewer than {counts.max()} studies: {listed}{more}.")
    if ruleset in TRIALS_PER_STUDY:
        sizes = taken.groupby(["submission", "workload", "study"]).size()
        odd = int((sizes != TRIALS_PER_STUDY[ruleset]).sum())
        if odd:
            notes.append(f"{odd} studies do not have the {TRIALS_PER_STUDY[ruleset]} trials of ruleset {ruleset}.")
    return notes
