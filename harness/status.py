"""What a folder of records holds at this moment: planned, running and finished trials, and the time left."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import ledger
from harness.ledger import Entry, State


@dataclass(frozen=True)
class Trial:
    entry: Entry
    state: State
    progress: float
    """Share of the budget in steps that lies behind it."""
    expected_seconds: float | None
    """Still to come, as trials of its kind have taken so far; None where none has finished yet."""


def survey(records: Path) -> tuple[list[Trial], list[str]]:
    """Every trial below `records`, and a line for each folder that cannot be read. UserError if it is no folder."""
    entries, problems = ledger.listed(records)
    found: list[tuple[Entry, State]] = []
    for entry in entries:
        try:
            found.append((entry, ledger.state_of(entry)))
        except ledger.UserError as error:
            problems += error.problems
    taken: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for entry, state in found:
        seconds = _wall_seconds(state)
        if state.is_over and seconds:
            workload = entry.base.facts.full_name
            for kind in (
                (entry.base.scale.name, workload, entry.base.submission_label),
                (entry.base.scale.name, workload),
            ):
                taken[kind].append(seconds)
    means = {kind: statistics.mean(seconds) for kind, seconds in taken.items()}
    trials = []
    for entry, state in found:
        progress, left = (1.0, 0.0) if state.is_over else (ledger.progress_of(entry), None)
        if not state.is_over:
            scale, workload, label = entry.base.scale.name, entry.base.facts.full_name, entry.base.submission_label
            whole = means.get((scale, workload, label), means.get((scale, workload)))
            left = None if whole is None else whole * (1 - progress)
        trials.append(Trial(entry, state, progress, left))
    return trials, problems


def seconds_left(trials: Sequence[Trial]) -> tuple[float, int]:
    """Until the last trial ends with as many workers as there are now (one if there is none), and the number of trials
    of which nobody can tell yet how long they take."""
    unfinished = [trial for trial in trials if not trial.state.is_over]
    workers = max(1, sum(trial.state.name == "running" for trial in unfinished))
    known = [trial.expected_seconds for trial in unfinished if trial.expected_seconds is not None]
    return max(sum(known) / workers, max(known, default=0.0)), len(unfinished) - len(known)


def print_status(console: Console, trials: Sequence[Trial], every: bool = False) -> None:
    """every: a line for each trial, not only for those that run, failed or wait for their turn again."""
    groups: dict[tuple[str, str, str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        scale, ruleset, machine, label = trial.entry.folder.parts[-7:-3]
        groups[f"{scale} {ruleset}", machine, trial.entry.base.facts.full_name, label].append(trial)
    table = Table(box=None, pad_edge=False)
    for head in ("ruleset", "machine", "workload", "submission", "over", "trials"):
        table.add_column(head, overflow="fold")
    for group, members in sorted(groups.items()):
        counts = Counter(trial.state.name.replace("_", " ") for trial in members)
        over = sum(trial.state.is_over for trial in members)
        table.add_row(*map(escape, group), f"{over}/{len(members)}",
                      ", ".join(f"{count} {name}" for name, count in counts.most_common()))  # fmt: skip
    console.print(table)
    for trial in trials:
        state = trial.state
        if every or state.name in ("running", "interrupted", "to retry", "failed"):
            who = f" by {state.worker}" if state.worker else ""
            at = f", {100 * trial.progress:.0f}% of the budget" if 0 < trial.progress < 1 else ""
            console.print(f"{state.name}{who}: {trial.entry.name}{at}", markup=False)
    over = sum(trial.state.is_over for trial in trials)
    running = sum(trial.state.name == "running" for trial in trials)
    console.print(f"{over} of {len(trials)} trials over, {running} running; {_left(trials, running)}", markup=False)


def _left(trials: Sequence[Trial], running: int) -> str:
    if all(trial.state.is_over for trial in trials):
        return "nothing left to do"
    seconds, unknown = seconds_left(trials)
    with_workers = f" with {running} at a time" if running else " with one at a time"
    said = f"about {seconds / 60:,.0f} minutes left{with_workers}" if seconds else "time left unknown"
    return said + (f", and {unknown} trials of kinds that nobody has finished yet" if unknown and seconds else "")


def _wall_seconds(state: State) -> float:
    """The whole trial with its evaluations, as the manifest tells."""
    final = state.manifest.get("final", {})
    seconds, share = final.get("submission_seconds"), final.get("evaluation_share", 0.0)
    return float(seconds) / (1 - share) if seconds and share < 1 else 0.0
