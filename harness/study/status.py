"""The present state of a folder of records: planned, running and finished trials, and the time left."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.errors import UserError
from harness.records.evaluations import read_evaluations
from harness.study.ledger import Phase, PlannedTrial, TrialState, list_all_trials, read_state


@dataclass(frozen=True)
class TrialProgress:
    """A trial with its state and how far it is."""

    trial: PlannedTrial
    state: TrialState
    progress: float
    """Share of the budget in steps that it has done."""
    expected_seconds: float | None
    """Still to come, estimated from finished trials of the same kind; None where none has finished yet."""


def survey_records(records: Path) -> tuple[list[TrialProgress], list[str]]:
    """Every trial below `records`, and a message for each folder that cannot be read. Raises UserError if it is no
    folder."""
    trials, messages = list_all_trials(records)
    states: list[tuple[PlannedTrial, TrialState]] = []
    for trial in trials:
        try:
            states.append((trial, read_state(trial)))
        except UserError as error:
            messages += error.messages
    expected = _mean_seconds(states)
    surveyed = []
    for trial, state in states:
        progress, left = 1.0, None
        if state.is_over:
            left = 0.0
        else:
            progress = _share_done(trial)
            scale, workload, label = _kind(trial)
            # Of the same submission if one has finished, else of any submission on the workload.
            duration = expected.get((scale, workload, label), expected.get((scale, workload)))
            left = None if duration is None else duration * (1 - progress)
        surveyed.append(TrialProgress(trial, state, progress, left))
    return surveyed, messages


def _kind(trial: PlannedTrial) -> tuple[str, str, str]:
    return trial.study.scale.name, trial.path.workload, trial.path.label


def _mean_seconds(states: Sequence[tuple[PlannedTrial, TrialState]]) -> dict[tuple[str, ...], float]:
    """Mean wall time of the trials that are over, by (scale, workload, label) and by (scale, workload)."""
    seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for trial, state in states:
        if state.is_over and (wall := _wall_seconds(state)):
            seconds[_kind(trial)].append(wall)
            seconds[_kind(trial)[:2]].append(wall)
    return {kind: statistics.mean(values) for kind, values in seconds.items()}


def _wall_seconds(state: TrialState) -> float:
    """Wall time of a whole trial with its evaluations, in seconds; 0 where the manifest does not tell."""
    seconds, evaluation_share = state.final.submission_seconds, state.final.evaluation_share or 0.0
    return seconds / (1 - evaluation_share) if seconds and evaluation_share < 1 else 0.0


def _share_done(trial: PlannedTrial) -> float:
    """Share of the budget that a trial has done, by its rows; 0 where there are none."""
    spec = trial.study.spec
    rows = read_evaluations(trial.path.evaluations, f"validation/{spec.metric}")
    return float(rows.steps[-1]) / spec.max_steps if rows is not None and len(rows.steps) else 0.0


def seconds_left(trials: Sequence[TrialProgress]) -> tuple[float, int]:
    """Seconds until the last trial ends with as many workers as there are now (one if there is none), and the number of
    trials whose duration nothing tells yet."""
    unfinished = [trial for trial in trials if not trial.state.is_over]
    workers = max(1, sum(trial.state.phase is Phase.RUNNING for trial in unfinished))
    known = [trial.expected_seconds for trial in unfinished if trial.expected_seconds is not None]
    # A single trial is never shared by workers, so the longest one is a lower bound.
    return max(sum(known) / workers, max(known, default=0.0)), len(unfinished) - len(known)


def print_status(console: Console, trials: Sequence[TrialProgress], every: bool = False) -> None:
    """Print a table of the studies and the time left. every: a line for each trial, instead of only for those that
    run, failed or wait for their turn again."""
    groups: dict[tuple[str, str, str, str], list[TrialProgress]] = defaultdict(list)
    for trial in trials:
        path = trial.trial.path
        groups[f"{path.scale} {path.ruleset}", path.machine, path.workload, path.label].append(trial)
    table = Table(box=None, pad_edge=False)
    for heading in ("ruleset", "machine", "workload", "submission", "over", "trials"):
        table.add_column(heading, overflow="fold")
    for group, members in sorted(groups.items()):
        counts = Counter(trial.state.name.replace("_", " ") for trial in members)
        over = sum(trial.state.is_over for trial in members)
        table.add_row(
            *map(escape, group),
            f"{over}/{len(members)}",
            ", ".join(f"{count} {name}" for name, count in counts.most_common()),
        )
    console.print(table)
    for trial in trials:
        state = trial.state
        if every or state.name in (Phase.RUNNING, Phase.INTERRUPTED, Phase.TO_RETRY, "failed"):
            worker = f" by {state.worker}" if state.worker else ""
            share = f", {100 * trial.progress:.0f}% of the budget" if 0 < trial.progress < 1 else ""
            console.print(f"{state.name}{worker}: {trial.trial.name}{share}", markup=False)
    over = sum(trial.state.is_over for trial in trials)
    running = sum(trial.state.phase is Phase.RUNNING for trial in trials)
    console.print(
        f"{over} of {len(trials)} trials over, {running} running; {_time_left(trials, running)}", markup=False
    )


def _time_left(trials: Sequence[TrialProgress], running: int) -> str:
    if all(trial.state.is_over for trial in trials):
        return "nothing left to do"
    seconds, unknown = seconds_left(trials)
    if not seconds:
        return "time left unknown"
    workers = f"{running} at a time" if running else "one at a time"
    further = f", and {unknown} trials of kinds of which none has finished yet" if unknown else ""
    return f"about {seconds / 60:,.0f} minutes left with {workers}{further}"
