"""What the user sees: a live line while a trial runs, plain lines where there is no terminal, a summary at the end; of
a pool of trials, a line for each that ends and a table of the studies."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from harness import ledger
from harness.ledger import Entry, State
from harness.problems import UserError
from harness.record import Record, Status

_MEANING = {
    Status.REACHED: "green",
    Status.EXHAUSTED: "yellow",
    Status.DIVERGED: "red",
    Status.OUT_OF_MEMORY: "red",
    Status.FAILED: "red",
    Status.PRUNED: "yellow",
    Status.STOPPED: "yellow",
}


class ProgressLine:
    """An observer. It draws at evaluations only, off the clock: no thread of its own competes with the training."""

    def __init__(self, console: Console, lines_every: int = 10) -> None:
        self._console = console
        self._lines_every = lines_every
        self._live: Progress | None = None
        self._count = 0

    def begin(self, record: Record, first_step: float) -> None:
        self._facts = record.run.facts
        if first_step:
            self._console.print(f"continuing from step {first_step:g}", highlight=False)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"),)  # fits 80 columns
            self._live = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            self._task = self._live.add_task("starting", total=self._facts.max_steps, completed=int(first_step))
            self._live.start()

    def evaluation(self, row: dict[str, Any]) -> None:
        facts = self._facts
        value = row[f"validation/{facts.metric}"]
        distance = facts.distance(value)
        done = row["global_step"] / facts.max_steps
        left = row["total_duration"] * (1 - done) / done
        text = (
            f"step {row['global_step']:g}/{facts.max_steps}  {row['accumulated_submission_time']:.1f} s  "
            f"train {row['train/loss']:.3f}  {facts.metric} {value:.4f}  "
            + ("target met  " if distance <= 0 else f"{distance:.4f} to target  ")
            + f"<{left + 1:.0f} s left"
        )
        self._count += 1
        if self._live is not None:
            self._live.update(self._task, completed=int(row["global_step"]), description=text)
            self._live.refresh()
        elif self._count % self._lines_every == 1:
            self._console.print(text, highlight=False, soft_wrap=True)

    def end(self, record: Record) -> None:
        self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def print_summary(console: Console, record: Record) -> None:
    """The outcome of a finished or stopped trial."""
    manifest, status = record.manifest, record.status
    final: dict[str, Any] = manifest.get("final", {})
    assert status is not None
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def line(name: str, text: str) -> None:
        table.add_row(name, text)

    metric = manifest["metric"]
    reason = f" ({escape(str(final['stop_reason']))})" if final.get("stop_reason") else ""
    line("status", f"[{_MEANING[status]}]{status}[/]{reason}")
    if final.get("steps_to_target") is not None:
        line(
            "time-to-target",
            f"{final['time_to_target']:.2f} s on the clock, known to {final['resolution_seconds']:.2f} s",
        )
        line("steps-to-target", f"{final['steps_to_target']:g}, known to {final['resolution_steps']:g}")
        name = metric.removeprefix("validation/")
        line("test at target", f"{name} {final[f'test/{name}_at_target']:.4f} (reported only)")
    if "parameters" in final:
        best = final[f"best_{metric}"]
        line(metric, f"{'none finite' if best is None else f'{best:.4f}'} best, target {manifest['target']:g}")
        line("peak memory", f"{final['peak_memory_bytes'] / 2**20:.0f} MiB")
        line("optimizer state", f"{final['optimizer_state_bytes_per_parameter']:.2f} bytes per parameter")
        line("waiting for data", f"{100 * final['data_wait_share']:.1f}% of the clock")
        if final["disturbed"]:
            line("disturbed", "[yellow]the machine was busy with something else; the seconds say little[/]")
    if manifest["modified"]:
        line("modified", "[yellow]not comparable: " + escape(", ".join(manifest["modified"])) + "[/]")
    if final.get("traceback"):
        line("error", escape(final["traceback"].strip().splitlines()[-1]) + " (traceback in the manifest)")
    line("record", escape(str(record.folder)))
    console.print(table)


class PoolProgress:
    """While open, a line for every trial that ends, whoever ran it: it watches the ledger, off everybody's clock."""

    LOOK_EVERY = 1.0

    def __init__(self, console: Console, entries: Sequence[Entry]) -> None:
        self._console, self._total = console, len(entries)
        self._pending = list(entries)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PoolProgress:
        before = len(self._pending)
        self._look(report=False)
        done = before - len(self._pending)
        said = f", {done} of them finished already" if done else ""
        self._console.print(f"{self._total} trials{said}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look(report=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.LOOK_EVERY):
            self._look(report=True)

    def _look(self, report: bool) -> None:
        for entry in list(self._pending):
            try:
                state = ledger.state_of(entry)
            except UserError:
                continue  # the worker that meets it says so
            if not state.is_over:
                continue
            self._pending.remove(entry)
            if report:
                number = self._total - len(self._pending)
                self._console.print(f"[{number}/{self._total}] {entry.name}: {_ending(state)}", markup=False)


def _ending(state: State) -> str:
    final = state.manifest.get("final", {})
    if final.get("steps_to_target") is not None:
        return f"{state.name} at {final['steps_to_target']:,g} steps, {final['time_to_target']:.1f} s on the clock"
    best = final.get(f"best_{state.manifest.get('metric')}")
    if best is not None:
        return f"{state.name}, best {best:.4f} where {state.manifest['target']:g} is the target"
    return f"{state.name}: {str(final.get('traceback') or '').strip().splitlines()[-1:] or ''}"


def print_studies(console: Console, entries: Sequence[Entry]) -> list[str]:
    """What came of each submission on each workload; the states of the trials."""
    groups: dict[tuple[str, str], dict[int, list[State]]] = defaultdict(lambda: defaultdict(list))
    states = [ledger.state_of(entry) for entry in entries]
    for entry, state in zip(entries, states, strict=True):
        groups[entry.base.facts.full_name, entry.base.submission_label][entry.seed].append(state)
    table = Table(box=None, pad_edge=False)
    for head in ("workload", "submission", "studies", "steps-to-target", "trials"):
        table.add_column(head, overflow="fold")
    for (workload, label), studies in sorted(groups.items()):
        best = [min((s for state in of_study if (s := _steps(state)) is not None), default=None)
                for _, of_study in sorted(studies.items())]  # fmt: skip
        reached = [steps for steps in best if steps is not None]
        median = statistics.median([float("inf") if steps is None else steps for steps in best])
        said = f"median {median:,g}" if median < float("inf") else "missed"
        listed = ", ".join("missed" if steps is None else f"{steps:,g}" for steps in best)
        counts = Counter(state.name.replace("_", " ") for of_study in studies.values() for state in of_study)
        table.add_row(
            workload, escape(label), f"{len(reached)} of {len(best)} reached", f"{said} ({listed})",
            ", ".join(f"{count} {name}" for name, count in counts.most_common()),
        )  # fmt: skip
    console.print(table)
    return [state.name for state in states]


def _steps(state: State) -> float | None:
    steps = state.manifest.get("final", {}).get("steps_to_target")
    return None if steps is None else float(steps)
