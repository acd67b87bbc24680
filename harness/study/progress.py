"""The display of trials: a live table while they run, lines where there is no terminal, tables of what came of them.

All of it shows what harness/study/status.py has read from the records.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from harness import log
from harness.records.status import CRASHED
from harness.study.ledger import Phase, PlannedTrial, TrialState, read_state
from harness.study.status import RecordsSurvey, Survey, TrialProgress, seconds_left

# A look and a drawing take 7 ms with 45 trials of which two run: 0.14 CPU seconds a minute (docs/studies.md), in the
# process of the command, where no trial waits for it.
REFRESH_SECONDS = 3.0
"""Between two looks at the records."""
LARGEST_SHARE = 0.01
"""Of a core that the display of a command may take: with thousands of trials it looks less often."""

logger = logging.getLogger(__name__)


# ---- while trials run ----------------------------------------------------------------------------------------------


class StudyDisplay:
    """A live table in a terminal; elsewhere a line for every trial that starts and for every one that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._phases: dict[Path, Phase] | None = None

    def __enter__(self) -> StudyDisplay:
        if self._console.is_terminal:
            # auto_refresh would start a thread that draws four times a second. Standard error is left alone where it
            # goes to a file.
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty()
            )
            self._live.start()
            log.show_above(self._console)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            log.show_above(None)
            self._live.stop()
            self._live = None

    def show(self, trials: Sequence[TrialProgress]) -> None:
        """Draw the table anew, or print what has happened since the last call."""
        former, self._phases = self._phases, {trial.trial.path.folder: trial.state.phase for trial in trials}
        over = sum(trial.state.is_over for trial in trials)
        if former is None:
            self._print(
                f"{len(trials)} trial{'s' * (len(trials) != 1)}"
                + (f", {over} of them finished already" if over else "")
            )
            former = {folder: phase for folder, phase in self._phases.items() if phase is Phase.OVER}
        number = sum(phase is Phase.OVER for phase in former.values())
        for trial in trials:
            phase, state = former.get(trial.trial.path.folder), trial.state
            if state.phase is Phase.RUNNING and phase is not Phase.RUNNING and self._live is None:
                share = f", at {100 * trial.progress:.0f}% of the budget" if trial.progress else ""
                self._print(f"{trial.trial.name}: started by {trial.worker}{share}")
            if state.is_over and phase is not Phase.OVER:
                number += 1
                # A crash stays visible above the table.
                if self._live is None or state.name in CRASHED:
                    self._print(f"[{number}/{len(trials)}] {trial.trial.name}: {describe_end(state)}")
        if self._live is not None:
            self._live.update(_live_tables(trials, self._console.width, self._console.height), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)


class PoolProgress:
    """While open, shows how the trials of a command stand, in this process or another, from a thread of its own."""

    def __init__(self, console: Console, trials: Sequence[PlannedTrial]) -> None:
        self._display, self._survey = StudyDisplay(console), Survey(trials)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PoolProgress:
        self._display.__enter__()
        # Before the thread starts, and in __exit__ after it has ended: the display has no lock.
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # Trials that ended after the last look.
        self._show()
        self._display.__exit__()

    def _watch(self) -> None:
        pause = REFRESH_SECONDS
        while not self._stop.wait(pause):
            before = time.thread_time()
            self._show()
            pause = max(REFRESH_SECONDS, (time.thread_time() - before) / LARGEST_SHARE)

    def _show(self) -> None:
        try:
            # The worker that comes to a trial whose manifest cannot be read reports it.
            trials, _ = self._survey.look()
        except OSError as error:
            # A file server that does not answer now may answer the next time.
            logger.debug("the records cannot be read this time: %s", error)
            return
        self._display.show(trials)


def watch_records(console: Console, records: Path, every: float = REFRESH_SECONDS) -> list[TrialProgress]:
    """Show how the trials below `records` stand until all are over; how they ended.

    Waits for the first trial, also where the folder is not there yet. every: seconds between two looks. Raises
    KeyboardInterrupt on Ctrl-C, with the terminal put right.
    """
    survey = RecordsSurvey(records)
    shown: set[str] = set()
    with StudyDisplay(console) as display:
        while True:
            trials, messages = survey.look() if records.is_dir() else ([], [])
            lines = [f"warning: {message}" for message in messages]
            if not trials:
                missing = f"no trial in {records} yet" if records.is_dir() else f"{records} is not there yet"
                lines.append(f"{missing}; waiting for it (Ctrl-C ends)")
            # Each once, and not again at every look.
            for line in lines:
                if line not in shown:
                    console.print(Text(line, style="yellow"))
                    shown.add(line)
            if trials:
                display.show(trials)
                if all(trial.state.is_over for trial in trials):
                    return trials
            time.sleep(every)


def _live_tables(trials: Sequence[TrialProgress], width: int, height: int) -> Group:
    """What the live display shows, in at most `height` lines of at most `width` columns."""
    running = [trial for trial in trials if trial.state.phase is Phase.RUNNING]
    text = describe_pool(trials)
    # In a table, where the console lets it be broken between words.
    summary = Table.grid()
    summary.add_row(text)
    # A heading and a line below it for each of two tables, and the summary, which is broken between words.
    room = max(2, height - 4 - (1 + len(text) * 10 // (9 * width)))
    shown = running[: max(1, room * 2 // 3)]
    parts: list[Table | Text] = []
    if running:
        parts += [running_table(shown, width), Text(_further(running, shown))]
    best, further = _best_table(trials, width, room - len(shown))
    return Group(*parts, best, Text(further), summary)


def _further(trials: Sequence[object], shown: Sequence[object]) -> str:
    number = len(trials) - len(shown)
    return f"... and {number} more, which scripts/status.py lists" if number else ""


def running_table(trials: Sequence[TrialProgress], width: int | None = None) -> Table:
    """A row for each running trial: where it is, and when it will end.

    width: columns of the terminal. What does not fit is, in this order: worker, steps per second, value of the metric,
    the end of the submission's name.
    """
    names = [trial.trial.name for trial in trials]
    columns = {"running trial": names, **_position_columns(trials), "worker": [trial.worker for trial in trials]}
    widths = {heading: max(map(len, (heading, *cells))) + 2 for heading, cells in columns.items()}
    if width is None:
        width = sum(widths.values())
    # Not left to rich, which takes from every column. The name of a submission keeps eight letters.
    labels = [trial.trial.path.label for trial in trials]
    shortest = max(len(name) - max(0, len(label) - 8) for name, label in zip(names, labels, strict=True))
    for heading in ("worker", "steps/s", "validation"):
        # The last column needs no gap.
        if sum(widths.values()) - 2 - (widths["running trial"] - 2 - shortest) > width:
            del columns[heading], widths[heading]
    room = width - sum(widths.values()) + widths["running trial"]
    columns["running trial"] = [
        _cut(label, room - len(name) + len(label)) + name[len(label) :]
        for name, label in zip(names, labels, strict=True)
    ]
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        is_number = heading in ("step", "to target", "steps/s", "time left")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, cells))
    return table


def _position_columns(trials: Sequence[TrialProgress]) -> dict[str, list[str]]:
    headings = ("step", "validation", "to target", "steps/s", "time left")
    return dict(zip(headings, map(list, zip(*map(_position_cells, trials), strict=True)), strict=True))


def _position_cells(trial: TrialProgress) -> tuple[str, str, str, str, str]:
    """The cells of `_position_columns`."""
    standing, spec = trial.standing, trial.spec
    left = "" if trial.expected_seconds is None else "<" * trial.is_bound + _clock(trial.expected_seconds)
    if standing is None:
        return f"0/{spec.max_steps}", "", "", "", left
    distance = spec.distance(standing.value)
    return (
        f"{standing.steps:g}/{spec.max_steps}",
        f"{spec.metric} {standing.value:.4f}",
        "met" if standing.steps_to_target is not None else f"{distance:.4f}",
        "" if math.isnan(standing.steps_per_second) else f"{standing.steps_per_second:.3g}",
        left,
    )


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: `4:05`, `1:04:05`."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _best_table(trials: Sequence[TrialProgress], width: int, rows: int) -> tuple[Table, str]:
    """The best so far of each submission on each workload, in at most so many rows: those that run now first. And a
    line about those that are left out."""
    cells: dict[tuple[str, str], list[TrialProgress]] = defaultdict(list)
    for trial in trials:
        cells[trial.trial.path.workload, trial.trial.path.label].append(trial)
    running = {cell for cell, members in cells.items() if any(t.state.phase is Phase.RUNNING for t in members)}
    ordered = sorted(cells, key=lambda cell: (cell not in running, cell))
    shown = ordered[: max(1, rows)]
    headings = ("workload", "submission", "over", "best so far")
    texts = [(*cell, _share_over(cells[cell]), describe_best(cells[cell])) for cell in shown]
    others = sum(max(map(len, column)) + 2 for i, column in enumerate(zip(headings, *texts, strict=True)) if i != 1)
    room = max(8, width - others)
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for workload, label, over, best in texts:
        table.add_row(workload, escape(_cut(label, room)), over, best)
    return table, _further(ordered, shown)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(1, room - 1)] + "…"


# ---- texts that all displays share ---------------------------------------------------------------------------------


def describe_best(trials: Sequence[TrialProgress]) -> str:
    """The best of some trials of a submission on a workload, the running ones included: steps to the target, else the
    best value of the metric and how far it is from the target. Empty where there is none."""
    steps = [trial.steps_to_target for trial in trials if trial.steps_to_target is not None]
    if steps:
        return f"target met at {min(steps):,g} steps"
    values = [(trial.spec.distance(trial.best_value), trial) for trial in trials if trial.best_value is not None]
    if not values:
        return ""
    distance, best = min(values, key=lambda entry: entry[0])
    return f"{best.spec.metric} {best.best_value:.4f}, {distance:.4f} to target"


def describe_pool(trials: Sequence[TrialProgress]) -> str:
    """How many trials are over and how they ended, how many run, and the time left, in a line."""
    over = Counter(trial.state.name.replace("_", " ") for trial in trials if trial.state.is_over)
    endings = ", ".join(f"{count} {name}" for name, count in over.most_common())
    running = sum(trial.state.phase is Phase.RUNNING for trial in trials)
    return (
        f"{over.total()} of {len(trials)} trials over{f' ({endings})' if endings else ''}, {running} running; "
        f"{_time_left(trials, running)}"
    )


def _time_left(trials: Sequence[TrialProgress], running: int) -> str:
    if all(trial.state.is_over for trial in trials):
        return "nothing left to do"
    seconds, unknown = seconds_left(trials)
    if not seconds:
        return "time left unknown until the first evaluation"
    workers = f"{running} at a time" if running else "one at a time"
    further = f", and {unknown} trials of workloads on which none has been evaluated yet" if unknown else ""
    bound = "at most " if any(trial.is_bound for trial in trials) else ""
    return f"{bound}about {_duration(seconds)} left with {workers}{further}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"


def _share_over(trials: Sequence[TrialProgress]) -> str:
    return f"{sum(trial.state.is_over for trial in trials)}/{len(trials)}"


def describe_end(state: TrialState) -> str:
    """How a trial that is over ended: its status with the steps and seconds to the target, or with the best value, or
    with what went wrong."""
    final, manifest = state.final, state.manifest
    if final.steps_to_target is not None and final.time_to_target is not None:
        return f"{state.name} at {final.steps_to_target:,g} steps, {final.time_to_target:.1f} s on the clock"
    best = None if manifest is None else final.of_metric(f"best_{manifest.metric}")
    if best is not None and manifest is not None:
        return f"{state.name}, best {best:.4f} where {manifest.target:g} is the target"
    # The last line of a traceback names the error; where the process was killed, the reason does.
    last_lines = [final.stop_reason] if final.stop_reason else (final.traceback or "").strip().splitlines()[-1:]
    return ": ".join([state.name, *last_lines])


# ---- tables of what there is ---------------------------------------------------------------------------------------


def print_status(console: Console, trials: Sequence[TrialProgress], every: bool = False) -> None:
    """Print a table of the studies, one of the running trials, and the time left. every: a line for each other trial,
    instead of only for those that failed or wait for their turn again."""
    groups: dict[tuple[str, str, str, str], list[TrialProgress]] = defaultdict(list)
    for trial in trials:
        path = trial.trial.path
        groups[f"{path.scale} {path.ruleset}", path.machine, path.workload, path.label].append(trial)
    table = Table(box=None, pad_edge=False)
    for heading in ("ruleset", "machine", "workload", "submission", "over", "trials", "best so far"):
        table.add_column(heading, overflow="fold")
    for group, members in sorted(groups.items()):
        counts = Counter(trial.state.name.replace("_", " ") for trial in members)
        listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        table.add_row(*map(escape, group), _share_over(members), listed, describe_best(members))
    console.print(table)
    running = [trial for trial in trials if trial.state.phase is Phase.RUNNING]
    if running:
        console.print()
        console.print(running_table(running))
        console.print()
    for trial in trials:
        name = trial.state.name
        if trial.state.phase is not Phase.RUNNING and (every or name in (Phase.INTERRUPTED, Phase.TO_RETRY, "failed")):
            share = f", {100 * trial.progress:.0f}% of the budget" if 0 < trial.progress < 1 else ""
            console.print(f"{name}: {trial.trial.name}{share}", markup=False)
    console.print(describe_pool(trials), markup=False)


def print_studies(console: Console, trials: Sequence[PlannedTrial]) -> list[TrialState]:
    """Print the results of each submission on each workload; returns the states of the trials, in their order."""
    states = [read_state(trial) for trial in trials]
    cells: dict[tuple[str, str], dict[int, list[TrialState]]] = defaultdict(lambda: defaultdict(list))
    for trial, state in zip(trials, states, strict=True):
        cells[trial.path.workload, trial.path.label][trial.path.study].append(state)
    table = Table(box=None, pad_edge=False)
    for heading in ("workload", "submission", "studies", "steps-to-target", "trials"):
        table.add_column(heading, overflow="fold")
    for (workload, label), studies in sorted(cells.items()):
        table.add_row(workload, escape(label), *_cell_texts([of_study for _, of_study in sorted(studies.items())]))
    console.print(table)
    return states


def _cell_texts(studies: Sequence[Sequence[TrialState]]) -> tuple[str, str, str]:
    """Columns of a submission on a workload: studies that reached the target, steps to it, trials by state."""
    best = [
        min((float(s) for state in of_study if (s := state.final.steps_to_target) is not None), default=float("inf"))
        for of_study in studies
    ]
    reached = sum(steps < float("inf") for steps in best)
    # A missed study counts as infinite, so the median is finite only if most studies reached the target.
    median = statistics.median(best)
    summary = f"median {median:,g}" if median < float("inf") else "missed"
    listed = ", ".join("missed" if steps == float("inf") else f"{steps:,g}" for steps in best)
    counts = Counter(state.name.replace("_", " ") for of_study in studies for state in of_study)
    return (
        f"{reached} of {len(best)} reached",
        f"{summary} ({listed})",
        ", ".join(f"{count} {name}" for name, count in counts.most_common()),
    )
