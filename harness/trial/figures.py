"""The figures of a trial: rows of eval_measurements.csv, and contents of its manifest at the start and at the end."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from harness.interface.needs import Need
from harness.interface.workload import Split
from harness.trial import hardware
from harness.trial.outcome import Outcome
from harness.trial.remote_training import AnyTraining

Row = dict[str, Any]
"""A row of eval_measurements.csv, by column."""


def row_values(
    training: AnyTraining,
    train_loss: float,
    metrics: dict[str, float],
    *,
    preemption_count: int,
    memory: dict[str, int],
    state_bytes: int,
) -> Row:
    """A row of eval_measurements.csv: AlgoPerf's columns first, ours after them.

    train_loss: mean over the steps since the last row. metrics: of the validation split. Times are in seconds, and
    accumulated since the trial began. memory: `PeakMemory.columns`.
    """
    # Brings total_duration up to date.
    training.clock.tick()
    elapsed = training.clock.elapsed
    return {
        "accumulated_submission_time": elapsed.submission,
        "accumulated_eval_time": elapsed.evaluation,
        "accumulated_logging_time": elapsed.logging,
        "global_step": training.nominal_step,
        # AlgoPerf scores by this column.
        "score": elapsed.submission,
        "total_duration": elapsed.total,
        "preemption_count": preemption_count,
        "train/loss": train_loss,
        **split_columns("validation", metrics),
        # Filled in where the test split is evaluated.
        **{f"test/{key}": "" for key in metrics},
        "accumulated_build_time": elapsed.build,
        "accumulated_compile_time": elapsed.compile,
        "accumulated_averaging_time": elapsed.averaging,
        "accumulated_data_wait_time": elapsed.data_wait,
        "accumulated_cpu_time": elapsed.cpu,
        **({} if elapsed.energy is None else {"accumulated_energy_joules": elapsed.energy}),
        **asdict(training.runner.counters),
        **memory,
        "optimizer_state_bytes": state_bytes,
        **training.witness.counters.columns(),
    }


def split_columns(split: Split, metrics: dict[str, float]) -> Row:
    """The columns of a split's metrics: `validation/loss`."""
    return {f"{split}/{key}": value for key, value in metrics.items()}


def manifest_values(training: AnyTraining) -> dict[str, Any]:
    """The keys of `harness.records.manifest.Manifest` for a trial that starts, without its configuration and status."""
    run, needs, spec = training.run, training.needs, training.spec
    return {
        "submission": run.submission_label,
        "workload": spec.full_name,
        **({"variant_of": spec.name} if spec.variant is not None and spec.held_out else {}),
        "workload_version": spec.version,
        "target_version": spec.target_version,
        "metric": f"validation/{spec.metric}",
        "direction": spec.direction,
        "target": spec.target,
        "hyperparameters": run.optimizer.effective_hyperparameters,
        "needs": sorted(needs),
        "arranged": {
            "compile": training.compiles_model,
            "attention": "math" if Need.SECOND_DERIVATIVES in needs else "fused where possible",
        },
        **({"remarks": training.remarks} if training.remarks else {}),
        "seeds": {"study": run.seed, "trial": run.trial, "base": training.seeds.base},
        "data": training.workload.fingerprint,
        "code": hardware.code_version(),
        "packages": hardware.package_versions(),
        "machine": hardware.describe_machine(training.device, run.threads),
    }


def final_values(
    training: AnyTraining, rows: list[Row], reached_row: int | None, state_bytes: int, outcome: Outcome
) -> dict[str, Any]:
    """The keys of `harness.records.manifest.FinalFigures` for a trial that has ended.

    reached_row: index of the row that met the target first. state_bytes: peak size of the submission's state.
    """
    final: dict[str, Any] = {"stop_reason": outcome.stop_reason}
    if outcome.lost_ranks:
        final["lost_ranks"] = outcome.lost_ranks
    if outcome.traceback is not None:
        final["traceback"] = outcome.traceback
    # A trial that ended before its first evaluation has no figures.
    if not rows or not training.is_built:
        return final
    spec, elapsed, last = training.spec, training.clock.elapsed, rows[-1]
    metric = f"validation/{spec.metric}"
    # The last value of a diverged trial is NaN, with which min and max depend on the order.
    values = [row[metric] for row in rows if math.isfinite(row[metric])]
    best = min if spec.direction == "min" else max
    parameters = training.parameter_count
    final |= {
        "time_to_target": None,
        "steps_to_target": None,
        "global_step": last["global_step"],
        "submission_seconds": last["accumulated_submission_time"],
        f"final_{metric}": last[metric],
        f"best_{metric}": best(values) if values else None,
        "peak_memory_bytes": last["peak_memory_bytes"],
        "parameters": parameters,
        "optimizer_state_bytes": state_bytes,
        "optimizer_state_bytes_per_parameter": state_bytes / parameters,
        "data_wait_share": elapsed.data_wait / elapsed.submission if elapsed.submission else 0.0,
        "evaluation_share": elapsed.evaluation / elapsed.total if elapsed.total else 0.0,
        **training.disturbance.summary(elapsed, training.device, training.run.threads),
    }
    # Otherwise the weights are of no whole step, and the device may never answer.
    if outcome.status.is_finished and not outcome.status.is_crash:
        final["weights_sha256"] = training.weights_sha256()
        if summary := training.record_summary():
            final["submission_summary"] = summary
    # The index is set before the row is appended, which an exception may have prevented.
    if reached_row is not None and reached_row < len(rows):
        final |= _at_target(rows, reached_row, spec.metric)
    return final


def _at_target(rows: list[Row], reached_row: int, metric: str) -> dict[str, Any]:
    """The figures at the target. resolution_*: how long before this row the target may have been met."""
    reached = rows[reached_row]
    before = rows[reached_row - 1] if reached_row else {}
    seconds, steps = "accumulated_submission_time", "global_step"
    joules = reached.get("accumulated_energy_joules")
    return {
        "time_to_target": reached[seconds],
        "steps_to_target": reached[steps],
        "resolution_seconds": reached[seconds] - before.get(seconds, 0.0),
        "resolution_steps": reached[steps] - before.get(steps, 0),
        "forward_examples_to_target": reached["forward_examples"],
        "backward_examples_to_target": reached["backward_examples"],
        **({} if joules is None else {"energy_joules_to_target": joules}),
        f"test/{metric}_at_target": reached[f"test/{metric}"],
    }
