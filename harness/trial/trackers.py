"""Optional trackers, which mirror the rows of a record. The files of the record remain authoritative."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.config.schema import Run
from harness.errors import UserError
from harness.hashing import short_hash
from harness.trial.figures import Row
from harness.trial.record import Record


def make_tracker(run: Run) -> WandbTracker | TensorBoardTracker | None:
    """The tracker that `tracker=` names, None for none; raises UserError if its package is missing."""
    if run.tracker.name == "none":
        return None
    try:
        return WandbTracker(run) if run.tracker.name == "wandb" else TensorBoardTracker(run)
    except ImportError as error:
        raise UserError(
            f"tracker={run.tracker.name}: {error.name} is not installed; "
            f"pip install -e '.[{run.tracker.name}]', or tracker=none"
        ) from error


def _mirrored_values(record: Record, row: Row) -> dict[str, float]:
    """What a tracker shows of a row, by a name in a group: `train/`, `validation/`, `clock/` (seconds), `trial/`, and
    with them the distance to the target and the learning rate.

    Without the test split, whose curve would be an invitation to tune on it, and without the NaN of a diverged trial.
    """
    run = record.run
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and math.isfinite(value) and not name.startswith("test/"):
            values[_grouped_name(name)] = value
    metric = values.get(f"validation/{run.spec.metric}")
    if metric is not None:
        values["validation/distance_to_target"] = run.spec.distance(metric)
    base = record.manifest.hyperparameters.get("lr") if record.manifest is not None else None
    if isinstance(base, int | float):
        values["train/lr"] = base * run.schedule.factor(row["global_step"], run.spec.max_steps)
    return values


def _grouped_name(column: str) -> str:
    """`clock/submission` for `accumulated_submission_time`, `trial/preemption_count` for a column without a group."""
    if column.startswith("accumulated_") and column.endswith("_time"):
        return f"clock/{column.removeprefix('accumulated_').removesuffix('_time')}"
    return column if "/" in column else f"trial/{column}"


class WandbTracker:
    """Weights & Biases. A study is a group; the id is a hash of the record's path, so that a resume continues the
    run."""

    def __init__(self, run: Run) -> None:
        # Here, since it is an optional dependency; make_tracker reports where it is missing.
        import wandb

        self._wandb, self._options = wandb, run.tracker

    def begin(self, record: Record, first_step: float) -> None:
        """As `harness.trial.trial.Observer.begin`."""
        run, manifest = record.run, record.manifest
        assert manifest is not None
        folder = self._options.folder or record.folder
        self._run = self._wandb.init(
            project=self._options.project,
            mode=self._options.mode,
            dir=str(folder),
            # Without the root folder, which may be moved between the kill and the resume.
            id=short_hash([str(record.folder.relative_to(run.records)), manifest.config_hash]),
            resume="allow",
            name=f"{run.submission_label} {run.spec.full_name} trial {run.trial}",
            job_type=run.ruleset.name,
            tags=[run.spec.full_name, run.scale_folder, run.ruleset.name, run.optimizer.name],
            group=f"{run.scale_folder}/{run.ruleset.name}/{run.submission_label}/study_{run.seed}",
            # What was asked for, and the hyperparameters that came of it: at a point of a search space, the drawn ones.
            config=manifest.config | {"hyperparameters": manifest.hyperparameters, "target": manifest.target},
            settings=self._wandb.Settings(silent=True, console="off", disable_git=True),
        )

        self._record = record
        # W&B buffers rows, and a kill loses those. All that the resumed run lacks are logged again. Offline, where
        # nothing says what the first part holds, that is every row, and W&B merges them by step.
        for row in record.rows:
            if not self._run.step or row["global_step"] > self._run.step:
                self.evaluation(row)

    def evaluation(self, row: Row) -> None:
        """As `harness.trial.trial.Observer.evaluation`."""
        self._run.log(_mirrored_values(self._record, row), step=int(row["global_step"]))

    def end(self, record: Record) -> None:
        """As `harness.trial.trial.Observer.end`."""
        summary: dict[str, Any] = {"status": str(record.status)}
        final = record.manifest.final if record.manifest is not None else None
        if final is not None:
            keys = {"time_to_target", "steps_to_target", "peak_memory_bytes", "disturbed"}
            summary |= final.model_dump(include=keys)
            summary["best"] = final.of_metric(f"best_validation/{record.run.spec.metric}")
        self._run.summary.update(summary)
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files; a resume drops the events after its checkpoint."""

    def __init__(self, run: Run) -> None:
        # torch's writer needs it, and its own message is less clear.
        import tensorboard  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter

        self._writer_class, self._folder = SummaryWriter, run.tracker.folder

    def begin(self, record: Record, first_step: float) -> None:
        """As `harness.trial.trial.Observer.begin`."""
        folder: Path = self._folder or record.folder / "tensorboard"
        self._record = record
        # The checkpoint's own step was logged, so events are dropped from the step after it on.
        self._writer = self._writer_class(str(folder), purge_step=int(first_step) + 1 if first_step else None)

    def evaluation(self, row: Row) -> None:
        """As `harness.trial.trial.Observer.evaluation`."""
        for name, value in _mirrored_values(self._record, row).items():
            self._writer.add_scalar(name, value, int(row["global_step"]))

    def end(self, record: Record) -> None:
        """As `harness.trial.trial.Observer.end`."""
        self._writer.close()
