"""The sentences above a board: how it was scored, and what was left out or is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from harness.config.compose import shipped_ruleset
from harness.records.status import UNFINISHED, UNUSABLE, Status
from harness.scoring import benchmark_score
from harness.scoring.study_results import CELL, STUDY, StudyResults
from harness.scoring.targets import Targets
from harness.scoring.timings import Timings

if TYPE_CHECKING:
    from harness.scoring.leaderboard import Leaderboard

MAX_LISTED = 8
"""Cells that a note names; the number of further ones is stated."""


def board_notes(board: Leaderboard, results: StudyResults, timings: Timings | None, ruleset: str | None) -> list[str]:
    """All notes of a board, in the order in which they are shown.

    ruleset: the one whose number of trials per study is checked; None for no check.
    """
    return [
        # First: harness/board/page_data.py takes these off the list, for places of their own.
        *_notes_on_intervals(board),
        *_notes_on_scoring(board, results.trials, timings),
        *_notes_on_held_out(results.seconds, board.targets),
        *_notes_on_unsolved(results.seconds, board.targets),
        *_notes_on_pruning(results.trials),
        *(board.tunability.left_out if board.tunability is not None else []),
        *_notes_on_studies(results.trials, ruleset),
        *_notes_on_records(board),
    ]


def _notes_on_intervals(board: Leaderboard) -> list[str]:
    notes = [board.uncertainty.method]
    if np.isfinite(board.uncertainty.detectable):
        percent = 100 * (board.uncertainty.detectable - 1)
        notes.append(f"The smallest difference in time that this table could have detected is {percent:.0f}%.")
    return notes


def _notes_on_scoring(board: Leaderboard, trials: pd.DataFrame, timings: Timings | None) -> list[str]:
    """Where the seconds come from, and under the default mode the scores that AlgoPerf's own rule would change."""
    if board.mode == "algoperf":
        return [
            "Scored as AlgoPerf does: the best trial of a study is the one with the smallest evaluation index at the "
            "target, the score a trapezoid over 100 points, the seconds each trial's own clock, the steps the "
            "global_step that each submission's log states."
        ]
    notes = []
    scores = board.scores
    # Half of the last digit that the note shows.
    differing = scores[(scores["score"] - scores["algoperf_score"]).abs() > 5e-5]
    if len(differing):
        listed = ", ".join(f"{row.submission} {row.algoperf_score:.4f}" for row in differing.itertuples())
        notes.append(f"Under AlgoPerf's own rule (--mode algoperf) these scores differ: {listed}.")
    if timings is not None:
        return [*notes, timings.sentence, *timings.doubts(trials)]
    machines = trials["machine"].dropna().unique()
    order = f"on {len(machines)} kinds of machine" if len(machines) > 1 else "one after the other"
    notes.append(f"Seconds are the clocks of trials that ran {order}; scripts/timing.py makes seconds that compare.")
    return notes


def _notes_on_held_out(times: pd.DataFrame, targets: Targets) -> list[str]:
    """What held-out workloads are, and the cells that were solved but do not count because of one."""
    run = [workload for workload in targets.held_out if workload in times]
    if not run:
        return []
    notes = [
        f"Held out: {', '.join(run)}. Each is a workload with one thing changed, run to see who over-fitted to that "
        "workload. It gives no points of its own; the workload counts only for submissions that also reach the target "
        f"of the variant, within {benchmark_score.TAU_MAX:g} times the fastest there."
    ]
    failed = benchmark_score.disqualified(times, targets) & np.isfinite(times.reindex(columns=list(targets.base)))
    cells = [f"{submission} on {workload}" for workload in failed for submission in failed.index[failed[workload]]]
    if cells:
        notes.append(f"Solved, but not counted for want of a held-out variant: {_list_some(cells)}.")
    return notes


def _notes_on_unsolved(times: pd.DataFrame, targets: Targets) -> list[str]:
    notes = []
    not_run = benchmark_score.unscored_held_out(times, targets)
    if not_run:
        notes.append(f"No submission ran {', '.join(not_run)}; these held-out workloads disqualify nobody.")
    unsolved = [
        workload for workload in targets.base if workload not in times or not np.isfinite(times[workload]).any()
    ]
    if unsolved:
        notes.append(f"No submission solved {', '.join(unsolved)}; they count in the score of all.")
    return notes


def _notes_on_pruning(trials: pd.DataFrame) -> list[str]:
    pruned = int((trials["status"] == Status.PRUNED).sum())
    if not pruned:
        return []
    return [
        f"{pruned} trials were stopped early by pruning= and count as misses of the length they had; "
        "docs/pruning.md says what that changes. A committed board has none."
    ]


def _notes_on_studies(trials: pd.DataFrame, ruleset: str | None) -> list[str]:
    notes = []
    is_absent = trials["trial"] == 0
    absent = trials[is_absent].groupby(CELL).size().reset_index(name="number")
    if len(absent):
        cells = [f"{row.submission} on {row.workload} {row.number}" for row in absent.itertuples()]
        notes.append(f"Absent studies, which count as not reached: {_list_some(cells)}.")
    trials = trials[~is_absent]
    counts = trials.groupby(CELL)["study"].nunique()
    fewer = counts[counts < counts.max()].reset_index()
    if len(fewer):
        cells = [f"{row.submission} on {row.workload} {row.study}" for row in fewer.itertuples()]
        notes.append(f"Fewer than {counts.max()} studies: {_list_some(cells)}.")
    rules = shipped_ruleset(ruleset) if ruleset is not None else None
    if rules is not None:
        sizes = trials.groupby(STUDY).size()
        odd = int((sizes != rules.trials).sum())
        if odd:
            notes.append(f"{odd} studies do not have the {rules.trials} trials of ruleset {ruleset}.")
    return notes


def _notes_on_records(board: Leaderboard) -> list[str]:
    notes = []
    if board.baseline is None:
        notes.append("No baseline was named (--baseline), so there is no speed-up.")
    unusable = int(board.records.trials["status"].isin([*UNUSABLE, *UNFINISHED]).sum())
    remarks = len(board.records.problems)
    if unusable or remarks:
        notes.append(f"{unusable} trials are missing, unfinished or refused; {remarks} remarks on reading.")
    return notes


def _list_some(cells: list[str]) -> str:
    more = f" and {len(cells) - MAX_LISTED} more" if len(cells) > MAX_LISTED else ""
    return f"{', '.join(cells[:MAX_LISTED])}{more}"
