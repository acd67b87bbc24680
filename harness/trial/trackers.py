"""Optional trackers, which mirror the rows of a record. The files of the record remain authoritative."""

from __future__ import annotations

import math
from pathlib import Path

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


def _finite_numbers(row: Row) -> dict[str, float]:
    """The cells to mirror: not the empty ones of the test split, nor the NaN of a diverged trial."""
    return {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}


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
            group=f"{run.scale_folder}/{run.ruleset.name}/{run.submission_label}/study_{run.seed}",
            config=manifest.config,
            settings=self._wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def evaluation(self, row: Row) -> None:
        """As `harness.trial.trial.Observer.evaluation`."""
        self._run.log(_finite_numbers(row), step=int(row["global_step"]))

    def end(self, record: Record) -> None:
        """As `harness.trial.trial.Observer.end`."""
        self._run.summary["status"] = str(record.status)
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
        # The checkpoint's own step was logged, so events are dropped from the step after it on.
        self._writer = self._writer_class(str(folder), purge_step=int(first_step) + 1 if first_step else None)

    def evaluation(self, row: Row) -> None:
        """As `harness.trial.trial.Observer.evaluation`."""
        for name, value in _finite_numbers(row).items():
            self._writer.add_scalar(name, value, int(row["global_step"]))

    def end(self, record: Record) -> None:
        """As `harness.trial.trial.Observer.end`."""
        self._writer.close()
