from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.records.lease import Lease
from harness.trial.record import Record, Status
from harness.trial.training import Training
from tests.harness.trial.test_trial import interrupted, stopped

Trial = Callable[..., Record]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_algoperf_columns_come_first_and_the_manifest_tells_all(trial: Trial) -> None:
    record = trial()
    with record.path.evaluations.open() as file:
        columns = next(csv.reader(file))
    assert columns[:7] == [
        "accumulated_submission_time", "accumulated_eval_time", "accumulated_logging_time", "global_step", "score",
        "total_duration", "preemption_count",
    ]  # fmt: skip
    assert {"validation/loss", "validation/num_examples", "test/loss", "train/loss"} < set(columns)
    manifest = json.loads(record.path.manifest.read_text())
    assert manifest["status"] == "exhausted"
    assert manifest["data"]["text"] and manifest["packages"]["torch"] and manifest["machine"]["cpu"]
    assert manifest["config"]["optimizer"]["name"] == "adamw" and len(manifest["config_hash"]) == 64
    assert manifest["seeds"]["study"] == 0 and manifest["workload_version"] >= 1
    assert {path.name for path in record.folder.iterdir()} == {"eval_measurements.csv", "manifest.json"}


def test_a_finished_trial_is_left_as_it_is(trial: Trial, tmp_path: Path) -> None:
    trial()
    before = contents(tmp_path)
    assert trial().rows == []
    assert contents(tmp_path) == before
    replaced = trial("overwrite=true")
    assert len(replaced.rows) == 4 and contents(tmp_path).keys() == before.keys()


def test_another_configuration_in_the_folder_is_refused(trial: Trial, tmp_path: Path) -> None:
    trial("label=mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"optimizer.hyperparameters.lr: 0.012 there, 0.5 now.*overwrite=true"):
        trial("label=mine", "optimizer.hyperparameters.lr=0.5")
    assert contents(tmp_path) == before
    trial("label=mine", "optimizer.hyperparameters.lr=0.5", "overwrite=true")


def test_a_trial_is_not_continued_by_another_version(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(trial)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("harness.trial.hardware.package_version", lambda: "9.9")
        with pytest.raises(UserError, match=r"begun by Pacemark .*, and this is 9\.9; .*overwrite=true"):
            trial()
    assert contents(tmp_path) == before
    assert trial().preemption_count == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage"])
def test_a_corrupt_checkpoint_is_refused(trial: Trial, tmp_path: Path, damage: str) -> None:
    def broken(*arguments: str) -> Record:
        record = trial(*arguments, "checkpoint_seconds=0")
        content = bytearray(record.path.checkpoint.read_bytes())
        if damage == "truncate":
            del content[len(content) // 2 :]
        elif damage == "flip":
            content[len(content) // 2] ^= 0xFF
        else:
            content = bytearray(os.urandom(1000))
        record.path.checkpoint.write_bytes(content)
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.trial.trial._Trial._train", _train_then_interrupt)
        broken()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint.pt is corrupt.*overwrite=true"):
        trial("checkpoint_seconds=0")
    assert contents(tmp_path) == before
    assert trial("checkpoint_seconds=0", "overwrite=true").status is Status.EXHAUSTED


def test_a_checkpoint_that_the_former_holder_writes_last_is_continued(trial: Trial) -> None:
    """It can come until the folder is taken."""
    record = stopped(trial)
    newer = record.path.checkpoint.read_bytes()
    torch.save({"training": {}, "rows": []}, record.path.checkpoint)
    acquire, first_rows = Lease.acquire, []

    def write_and_acquire(*arguments: Any, **options: Any) -> Lease | None:
        record.path.checkpoint.write_bytes(newer)
        return acquire(*arguments, **options)

    def note_rows(self: Record) -> None:
        first_rows.append(len(self.rows))
        write_rows(self)

    write_rows = Record.write_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "acquire", write_and_acquire)
        patch.setattr(Record, "write_rows", note_rows)
        assert trial().status is Status.EXHAUSTED
    assert first_rows[0] == 2


def _train_then_interrupt(self, resumed: bool) -> Status:  # type: ignore[no-untyped-def]
    self.record.append(self._row(self.training.segment(24, True), self._evaluate("validation")))
    self.record.save_checkpoint(self._checkpoint())
    raise KeyboardInterrupt


def test_a_damaged_manifest_is_refused_and_can_be_replaced(trial: Trial) -> None:
    record = trial()
    record.path.manifest.write_text("{ not json")
    with pytest.raises(UserError, match="overwrite=true"):
        trial()
    assert trial("overwrite=true").status is Status.EXHAUSTED


def test_rows_after_the_last_checkpoint_are_made_again(trial: Trial) -> None:
    record = interrupted(trial)
    with record.path.evaluations.open() as file:
        steps = [row["global_step"] for row in csv.DictReader(file)]
    assert steps == ["3", "6", "9", "12"]


def test_a_folder_that_cannot_be_written(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="records="):
        trial(f"records={tmp_path / 'file' / 'records'}")
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_while_training_loses_nothing(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Record.append

    def full(self: Record, row: dict[str, object]) -> None:
        if len(self.rows) == 2:
            raise OSError(28, "No space left on device")
        append(self, row)

    uninterrupted = trial("label=whole")
    monkeypatch.setattr(Record, "append", full)
    with pytest.raises(UserError, match=r"No space left on device.*continues from the last checkpoint"):
        trial("checkpoint_seconds=0")
    monkeypatch.undo()
    finished = trial("checkpoint_seconds=0")
    assert finished.manifest.final.weights_sha256 == uninterrupted.manifest.final.weights_sha256


def test_two_processes_cannot_write_one_trial(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, calls = Training.segment, 0

    def with_a_second_process(self: Training, goal: int, charge_compile: bool) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # a checkpoint is there by now, which a resume would take the rows from
            csv = next(tmp for tmp in self.run.records.rglob("eval_measurements.csv"))
            rows = csv.read_bytes()
            csv.write_bytes(rows + b"newer than the checkpoint")
            with pytest.raises(UserError, match="another process"):
                trial("checkpoint_seconds=0")
            assert csv.read_bytes() == rows + b"newer than the checkpoint"
            raise KeyboardInterrupt
        return segment(self, goal, charge_compile)

    with monkeypatch.context() as patch:
        patch.setattr("harness.trial.training.Training.segment", with_a_second_process)
        assert trial("checkpoint_seconds=0").status is Status.STOPPED
    assert trial("checkpoint_seconds=0").status is Status.EXHAUSTED
