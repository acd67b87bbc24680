"""Optional trackers. They mirror the record's rows; the local files stay the truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.config import Run, short_hash
from harness.problems import UserError
from harness.record import Record


def make_tracker(run: Run) -> WandbTracker | TensorBoardTracker | None:
    """The tracker that `tracker=` names; UserError if its package is missing."""
    if run.tracker.name == "none":
        return None
    try:
        return WandbTracker(run) if run.tracker.name == "wandb" else TensorBoardTracker(run)
    except ImportError as error:
        raise UserError(
            f"tracker={run.tracker.name}: {error.name} is not installed; "
            f"pip install -e '.[{run.tracker.name}]', or tracker=none"
        ) from error


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}


class WandbTracker:
    """Weights & Biases. group = study; the id is a hash of the record's place, so a resume continues the run."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._wandb, self._options = wandb, run.tracker

    def begin(self, record: Record, first_step: float) -> None:
        run = record.run
        folder = self._options.folder or record.folder
        self._run = self._wandb.init(
            project=self._options.project,
            mode=self._options.mode,
            dir=str(folder),
            id=short_hash([str(record.folder.relative_to(run.records)), record.manifest["config_hash"]]),
            resume="allow",
            name=f"{run.submission_label} {run.facts.full_name} trial {run.trial}",
            group=f"{run.scale_folder}/{run.ruleset.name}/{run.submission_label}/study_{run.seed}",
            config=record.manifest["config"],
            settings=self._wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def evaluation(self, row: dict[str, Any]) -> None:
        self._run.log(_numbers(row), step=int(row["global_step"]))

    def end(self, record: Record) -> None:
        self._run.summary["status"] = str(record.status)
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files; a resume drops the events after its checkpoint."""

    def __init__(self, run: Run) -> None:
        import tensorboard  # noqa: F401  - torch's writer needs it and says so less clearly
        from torch.utils.tensorboard import SummaryWriter

        self._writer_class, self._folder = SummaryWriter, run.tracker.folder

    def begin(self, record: Record, first_step: float) -> None:
        folder: Path = self._folder or record.folder / "tensorboard"
        self._writer = self._writer_class(str(folder), purge_step=int(first_step) + 1 if first_step else None)

    def evaluation(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, int(row["global_step"]))

    def end(self, record: Record) -> None:
        self._writer.close()
