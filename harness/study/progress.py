"""The display of a pool of trials: a line for each that ends, and a table of the studies at the end."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.errors import UserError
from harness.study.ledger import PlannedTrial, TrialState, read_state


class PoolProgress:
    """While open, prints a line for every trial that ends, in this process or another, by watching the ledger."""

    POLL_SECONDS = 1.0

    def __init__(self, console: Console, trials: Sequence[PlannedTrial]) -> None:
        self._console, self._total = console, len(trials)
        self._pending = list(trials)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PoolProgress:
        # Before the thread starts, and in __exit__ after it has ended: _pending has no lock.
        self._drop_finished(report=False)
        finished = self._total - len(self._pending)
        self._console.print(f"{self._total} trials" + (f", {finished} of them finished already" if finished else ""))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # Trials that ended after the last poll.
        self._drop_finished(report=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.POLL_SECONDS):
            self._drop_finished(report=True)

    def _drop_finished(self, report: bool) -> None:
        # A copy, since trials are removed within the loop.
        for trial in list(self._pending):
            try:
                state = read_state(trial)
            except UserError:
                continue  # the worker that comes to this trial reports it
            if not state.is_over:
                continue
            self._pending.remove(trial)
            if report:
                number = self._total - len(self._pending)
                self._console.print(f"[{number}/{self._total}] {trial.name}: {_describe_end(state)}", markup=False)


def _describe_end(state: TrialState) -> str:
    final, manifest = state.final, state.manifest
    if final.steps_to_target is not None and final.time_to_target is not None:
        return f"{state.name} at {final.steps_to_target:,g} steps, {final.time_to_target:.1f} s on the clock"
    best = None if manifest is None else final.of_metric(f"best_{manifest.metric}")
    if best is not None and manifest is not None:
        return f"{state.name}, best {best:.4f} where {manifest.target:g} is the target"
    last_lines = (final.traceback or "").strip().splitlines()[-1:]
    return ": ".join([state.name, *last_lines])


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
