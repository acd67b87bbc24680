"""The display of a single trial: a live line, or plain lines where there is no terminal, and a summary."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn

from harness import log
from harness.records.manifest import FinalFigures, Manifest
from harness.records.status import Status
from harness.trial.figures import Row
from harness.trial.record import Record

_COLOURS = {
    Status.REACHED: "green",
    Status.EXHAUSTED: "yellow",
    Status.DIVERGED: "red",
    Status.OUT_OF_MEMORY: "red",
    Status.FAILED: "red",
    Status.PRUNED: "yellow",
    Status.STOPPED: "yellow",
}


class ProgressLine:
    """An observer that draws at evaluations only, off the clock: no thread of its own competes with the training."""

    def __init__(self, console: Console, lines_every: int = 10) -> None:
        """lines_every: evaluations between two lines where there is no terminal."""
        self._console = console
        self._lines_every = lines_every
        self._live: Progress | None = None
        self._evaluations = 0

    def begin(self, record: Record, first_step: float) -> None:
        """As `harness.trial.trial.Observer.begin`."""
        self._spec = record.run.spec
        if first_step:
            self._console.print(f"continuing from step {first_step:g}", highlight=False)
        if self._console.is_terminal:
            # A description alone fits 80 columns.
            columns = (TextColumn("{task.description}"),)
            # auto_refresh would start a thread that draws while the clock runs.
            self._live = Progress(
                *columns,
                console=self._console,
                auto_refresh=False,
                transient=True,
                # Left alone where it goes to a file.
                redirect_stderr=sys.stderr.isatty(),
            )
            self._task = self._live.add_task("starting", total=self._spec.max_steps, completed=int(first_step))
            self._live.start()
            log.show_above(self._console)

    def evaluation(self, row: Row) -> None:
        """As `harness.trial.trial.Observer.evaluation`."""
        spec = self._spec
        value = row[f"validation/{spec.metric}"]
        distance = spec.distance(value)
        # The last batch can go beyond the budget.
        share_done = min(1.0, row["global_step"] / spec.max_steps)
        # From the whole budget: an upper bound, since the target may be met before its end.
        seconds_left = row["total_duration"] * (1 - share_done) / share_done
        text = (
            f"step {row['global_step']:g}/{spec.max_steps}  {row['accumulated_submission_time']:.1f} s  "
            f"train {row['train/loss']:.3f}  {spec.metric} {value:.4f}  "
            + ("target met  " if distance <= 0 else f"{distance:.4f} to target  ")
            + f"<{seconds_left + 1:.0f} s left"
        )
        self._evaluations += 1
        if self._live is not None:
            self._live.update(self._task, completed=int(row["global_step"]), description=text)
            self._live.refresh()
        elif (self._evaluations - 1) % self._lines_every == 0:
            self._console.print(text, highlight=False, soft_wrap=True)

    def end(self, record: Record) -> None:
        """As `harness.trial.trial.Observer.end`."""
        self.close()

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            log.show_above(None)
            self._live.stop()
            self._live = None


def print_summary(console: Console, record: Record) -> None:
    """Print the outcome of a finished or stopped trial."""
    assert record.manifest is not None
    lines = [*_summary_lines(record.manifest), ("record", escape(str(record.folder)))]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        # Lines and no table: a terminal wraps them itself, so that the path can be copied whole.
        console.print(f"[bold]{name:{width}}[/] {text}", soft_wrap=True, highlight=False)


def _summary_lines(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, text) of each line, as markup of rich."""
    # Of a damaged record, which need not have what a finished trial has.
    final = manifest.final if manifest.final is not None else FinalFigures()
    status, metric = manifest.status, manifest.metric
    reason = f" ({escape(final.stop_reason)})" if final.stop_reason else ""
    lines = [("status", f"[{_COLOURS[status]}]{status}[/]{reason}")]
    if final.time_to_target is not None and final.steps_to_target is not None:
        seconds, steps = final.resolution_seconds or 0.0, final.resolution_steps or 0
        lines.append(("time-to-target", f"{final.time_to_target:.2f} s on the clock, known to {seconds:.2f} s"))
        lines.append(("steps-to-target", f"{final.steps_to_target:g}, known to {steps:g}"))
        test = final.of_metric(f"test/{manifest.metric_name}_at_target")
        if test is not None:
            lines.append(("test at target", f"{manifest.metric_name} {test:.4f} (reported only)"))
    # Absent where the trial ended before its first evaluation.
    if final.parameters is not None:
        best = final.of_metric(f"best_{metric}")
        found_best = "none finite" if best is None else f"{best:.4f}"
        lines.append((metric, f"{found_best} best, target {manifest.target:g}"))
        lines.append(("peak memory", f"{(final.peak_memory_bytes or 0) / 2**20:.0f} MiB"))
        state = final.optimizer_state_bytes_per_parameter or 0.0
        lines.append(("optimizer state", f"{state:.2f} bytes per parameter"))
        lines.append(("waiting for data", f"{100 * (final.data_wait_share or 0.0):.1f}% of the clock"))
        if final.disturbed:
            text = "[yellow]the machine was busy with something else; the seconds are not reliable[/]"
            lines.append(("disturbed", text))
    if manifest.modified:
        lines.append(("modified", "[yellow]not comparable: " + escape(", ".join(manifest.modified)) + "[/]"))
    if manifest.final is None:
        lines.append(("error", "the manifest has no final figures; overwrite=true runs the trial again"))
    if final.traceback and final.traceback.strip():
        last_line = final.traceback.strip().splitlines()[-1]
        lines.append(("error", escape(last_line) + " (traceback in the manifest)"))
    return lines
