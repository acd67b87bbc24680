"""The rows of a trial against its manifest and against themselves: times and counts that must add up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.interface.needs import Need
from harness.records.evaluations import Array, Evaluations
from harness.records.manifest import Manifest
from harness.records.status import Status
from harness.review.finding import Remark, refused, warning

_EXACT = 1e-6
"""Relative difference of two readings of one number, which JSON and CSV both hold in full."""
_PARTS, _PARTS_SECONDS = 0.01, 0.1
"""Relative and absolute slack of times that must add up, since each is read by itself."""
_UNEXPLAINED, _UNEXPLAINED_SECONDS = 0.1, 10.0
"""Share of the wall time, and seconds, that no column accounts for in an honest trial: at most 2.5 % and 3 s in the 789
committed ones."""
_CPU, _CPU_SECONDS = 1.1, 0.5
"""CPU seconds that a thread may take in a second, and seconds besides."""
_FASTEST_SEGMENT = 1 / 50
"""Seconds per step of a segment over the trial's median below which something is wrong. On a machine whose load changed
in the middle of a trial they fell to a twelfth."""
_FURTHER_GRADIENTS = {
    Need.RE_EVALUATE,
    Need.SAMPLED_LABELS,
    Need.SECOND_DERIVATIVES,
    Need.MICRO_BATCH_GRADIENTS,
}
"""Needs of submissions that take more than one gradient of a batch."""
# Averaged weights get statistics of BatchNorm of their own.
_FURTHER_FORWARDS = {*_FURTHER_GRADIENTS, Need.LOSS, Need.EVALUATION_WEIGHTS}
"""Needs of submissions that pass more through the model than their batches."""
_GROWING = (
    "submission_time", "evaluation", "logging", "total", "build", "compile", "averaging", "data_wait", "cpu",
    "update_steps", "examples", "forward_examples", "backward_examples",
)  # fmt: skip


@dataclass(frozen=True)
class TrialRows:
    """The rows of one trial that have a time and a step, each column an array float [rows]."""

    seconds: Array
    steps: Array
    value: Array
    """Of the metric that the trial's target is about."""
    further: dict[str, Array]
    """By the names of `REVIEW_COLUMNS`; NaN where the file lacks the column."""

    @classmethod
    def of(cls, rows: Evaluations, trial: int) -> TrialRows:
        """Those of a trial, by its number there."""
        place = rows.rows_of(trial)
        seconds = rows.seconds[place]
        usable = np.isfinite(seconds)
        further = {name: column[place][usable] for name, column in rows.further.items()}
        return cls(seconds[usable], rows.steps[place][usable], rows.value[place][usable], further)

    def last(self, name: str) -> float:
        """The value of a column in the last row, NaN without one."""
        column = self.further.get(name)
        return float(column[-1]) if column is not None and len(column) else math.nan


def check_columns(manifest: Manifest, rows: TrialRows) -> Iterator[Remark]:
    """What in the rows of a trial contradicts its manifest or the other columns."""
    if not len(rows.seconds):
        return
    yield from _check_final(manifest, rows)
    yield from _check_times(manifest, rows)
    workload = manifest.identity.get("workload")
    if isinstance(workload, dict):
        yield from _check_grid(manifest, rows, workload)
        yield from _check_counts(manifest, rows, workload)


def _needs(manifest: Manifest) -> set[str]:
    return set(manifest.needs)


# ---- against the manifest ------------------------------------------------------------------------------------------


def _check_final(manifest: Manifest, rows: TrialRows) -> Iterator[Remark]:
    """Time- and steps-to-target, and how the trial ended, as the rows give them."""
    final, status = manifest.final, manifest.status
    if final is None or not status.is_finished:
        return
    # A loss of minus infinity is a failure, and meets no target.
    value = np.where(np.isfinite(rows.value), rows.value, np.nan)
    with np.errstate(invalid="ignore"):
        meets = value <= manifest.target if manifest.direction == "min" else value >= manifest.target
    first = int(np.argmax(meets)) if meets.any() else None
    recomputed = {
        "time_to_target": None if first is None else float(rows.seconds[first]),
        "steps_to_target": None if first is None else float(rows.steps[first]),
    }
    for key, of_rows in recomputed.items():
        if not _is_same(getattr(final, key), of_rows):
            yield refused(
                f"final.{key}={getattr(final, key)}, and the rows give {of_rows}; send the record as the run wrote it"
            )
    if (status is Status.REACHED) != (first is not None) and status in (Status.REACHED, Status.EXHAUSTED):
        yield refused(f"status={status}, and the rows say otherwise; send the record as the run wrote it")
    if final.global_step is not None and not _is_same(final.global_step, float(rows.steps[-1])):
        yield refused(
            f"final.global_step={final.global_step}, and the last row has {rows.steps[-1]:g}; send the record as the "
            "run wrote it"
        )
    best = final.of_metric(f"best_{manifest.metric}")
    if best is not None and np.isfinite(value).any():
        of_rows_best = float(np.nanmin(value) if manifest.direction == "min" else np.nanmax(value))
        if not _is_same(best, of_rows_best):
            yield refused(f"final.best_{manifest.metric}={best}, and the rows give {of_rows_best}; send it unchanged")


def _is_same(a: Any, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float) and math.isclose(a, b, rel_tol=_EXACT, abs_tol=1e-9)


# ---- times ---------------------------------------------------------------------------------------------------------


def _check_times(manifest: Manifest, rows: TrialRows) -> Iterator[Remark]:
    # Names of columns, without those that the file lacks.
    columns = {name: column for name, column in rows.further.items() if np.isfinite(column).any()}
    shrinking = [name for name in _GROWING if name in columns and (np.diff(columns[name]) < -1e-9).any()]
    if shrinking:
        yield refused(f"{', '.join(shrinking)}: decrease from one row to a later one; send it as the run wrote it")
    clock = rows.seconds
    if "submission_time" in columns and not np.allclose(columns["submission_time"], clock, rtol=_EXACT, equal_nan=True):
        yield refused("score: not equal to accumulated_submission_time; send the record as the run wrote it")

    def get(name: str) -> Array:
        return np.nan_to_num(columns.get(name, np.zeros_like(clock)))

    def exceeds(parts: Array, whole: Array) -> bool:
        return bool((parts > whole * (1 + _PARTS) + _PARTS_SECONDS).any())

    # What is compiled while the submission is built, or in a step, is in two of the columns.
    parts = np.maximum(get("build") + get("averaging") + get("data_wait"), get("compile"))
    if exceeds(parts, clock):
        yield refused(
            f"accumulated_submission_time={clock[-1]:.4g}: less than building, compiling, averaging and waiting for "
            f"data, {parts[-1]:.4g}; send the record as the run wrote it"
        )
    if "total" in columns:
        counted = clock + get("evaluation") + get("logging")
        total = columns["total"]
        if exceeds(counted, total):
            yield refused(
                f"total_duration={total[-1]:.4g}: less than submission, evaluation and logging together, "
                f"{counted[-1]:.4g}; send the record as the run wrote it"
            )
        unexplained = float(total[-1] - counted[-1])
        # Compiling the workload's model is in none of the columns.
        compiles = manifest.identity.get("compile") is not False
        if not compiles and unexplained > _UNEXPLAINED * total[-1] + _UNEXPLAINED_SECONDS:
            yield warning(f"total_duration={total[-1]:.4g}: no column accounts for {unexplained:.4g} s of it; ask why")
    yield from _check_cpu(manifest, rows, get("cpu"))
    if "evaluation" in columns and (np.diff(get("evaluation"), prepend=0.0) <= 0).any():
        yield warning("accumulated_eval_time: an evaluation took no time; ask how it was made")
    yield from _check_speed(rows)


def _check_cpu(manifest: Manifest, rows: TrialRows, cpu: Array) -> Iterator[Remark]:
    threads = manifest.identity.get("threads")
    # On a GPU, threads of the driver wait actively.
    if manifest.machine.get("device") != "cpu" or not isinstance(threads, int) or not rows.seconds[-1]:
        return
    if cpu[-1] > _CPU * threads * rows.seconds[-1] + _CPU_SECONDS:
        yield warning(
            f"accumulated_cpu_time={cpu[-1]:.4g}: {cpu[-1] / rows.seconds[-1]:.2f} s in a second of the clock, and "
            f"threads={threads}; ask what ran beside"
        )


def _check_speed(rows: TrialRows) -> Iterator[Remark]:
    seconds, steps = (np.diff(column, prepend=0.0) for column in (rows.seconds, rows.steps))
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = seconds / steps
    if ((seconds <= 0) & (steps > 0)).any():
        yield refused(
            "accumulated_submission_time: does not grow from one row to the next; send it as the run wrote it"
        )
    elif len(rate) > 2 and np.nanmin(rate) < _FASTEST_SEGMENT * np.nanmedian(rate):
        yield warning(
            f"accumulated_submission_time: a segment of {np.nanmin(rate):.2g} s a step, and the median is "
            f"{np.nanmedian(rate):.2g}; ask why"
        )


# ---- counts --------------------------------------------------------------------------------------------------------


def _check_grid(manifest: Manifest, rows: TrialRows, workload: dict[str, Any]) -> Iterator[Remark]:
    """Evaluations are made on the workload's grid and not beyond its budget."""
    every, budget = workload.get("eval_every"), workload.get("max_steps")
    if not isinstance(every, int) or not isinstance(budget, int) or every < 1:
        return
    steps = rows.steps
    # The step that meets the end of the budget can pass it, where a submission chooses its batches.
    selects = Need.SELECTION in _needs(manifest)
    largest = budget + (_largest_batch(rows, workload) + every if selects else 0.0)
    if steps[-1] > largest or (steps[:-1] >= budget).any():
        yield refused(f"global_step={steps[-1]:g}: beyond the budget of {budget} steps; send it as the run wrote it")
    # A trial that breaks down can leave its last row anywhere, and so can one that was interrupted.
    ended = manifest.status in (Status.REACHED, Status.EXHAUSTED, Status.PRUNED)
    on_grid = steps if ended else steps[:-1]
    if selects:
        places = np.minimum(np.floor(on_grid / every), np.floor(budget / every))
        off = (np.diff(places, prepend=0) < 1) & (on_grid < budget)
    else:
        expected = np.minimum(every * np.arange(1, len(on_grid) + 1), budget)
        off = on_grid != expected
    if off.any():
        row = int(np.argmax(off))
        yield refused(
            f"global_step={on_grid[row]:g} in row {row + 1}: evaluations are made every {every} steps; send the record "
            "as the run wrote it"
        )


def _largest_batch(rows: TrialRows, workload: dict[str, Any]) -> float:
    """Nominal steps of a segment's mean batch, the largest."""
    updates = np.diff(rows.further.get("update_steps", np.full_like(rows.steps, np.nan)), prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        batches = np.diff(rows.steps, prepend=0.0) / updates
    batches = batches[np.isfinite(batches)]
    return float(2 * batches.max()) if len(batches) else 0.0


def _check_counts(manifest: Manifest, rows: TrialRows, workload: dict[str, Any]) -> Iterator[Remark]:
    nominal = workload.get("nominal_batch")
    examples, updates = rows.last("examples"), rows.last("update_steps")
    forward, steps = rows.last("forward_examples"), float(rows.steps[-1])
    if not isinstance(nominal, int) or not math.isfinite(examples):
        return
    if not math.isclose(examples, steps * nominal, rel_tol=_EXACT, abs_tol=1):
        yield refused(
            f"examples={examples:g}: {steps:g} steps of {nominal} are {steps * nominal:g}; send it as the run wrote it"
        )
        return
    selects = Need.SELECTION in _needs(manifest)
    if not selects and updates > steps:
        yield refused(
            f"update_steps={updates:g}: more than the {steps:g} nominal steps, and Need.SELECTION is not declared"
        )
    elif not selects and updates < steps:
        yield warning(f"update_steps={updates:g}: fewer than the {steps:g} nominal steps; ask why")
    closure = manifest.optimizer.get("closure") is True
    for name, may_exceed in (("forward_examples", _FURTHER_FORWARDS), ("backward_examples", _FURTHER_GRADIENTS)):
        passed = rows.last(name)
        if passed > examples * (1 + _EXACT) and not closure and not may_exceed & _needs(manifest):
            yield refused(
                f"{name}={passed:g}: more than the {examples:g} examples of its batches, and no declared need "
                "takes a batch twice"
            )
    if forward < examples * (1 - _EXACT):
        yield warning(f"forward_examples={forward:g}: fewer than the {examples:g} examples of its batches; ask why")
