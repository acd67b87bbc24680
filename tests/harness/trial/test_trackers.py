from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.compose import load_run
from harness.errors import UserError
from harness.trial.trackers import make_tracker
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2
from tests.harness.trial.test_trial import stopped
from tests.processes import wait_until


def read_log(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format (doc/log_format.md in google/leveldb) after 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _checksum, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        # Whole, or the last of several fragments.
        if kind in (1, 4):
            yield parts
            parts = b""


def read_wandb(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, float]], dict[str, Any]]:
    """Config, rows by step and summary of an offline run."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")

    def records() -> list[Any]:
        return [wandb_internal_pb2.Record.FromString(content) for content in read_log(path.read_bytes())]

    def is_whole() -> bool:
        try:
            return any(record.HasField("exit") for record in records())
        # A record of which a part is there.
        except DecodeError:
            return False

    # W&B's own process may still write when `finish` has returned; the record of the exit comes last.
    wait_until(is_whole)
    config: dict[str, Any] = {}
    rows: dict[int, dict[str, float]] = {}
    summary: dict[str, Any] = {}
    for record in records():
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config["tags"] = list(record.run.tags)
        elif kind == "history":
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            rows[int(record.history.step.num)] = items
        elif kind == "summary":
            summary |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.summary.update}
    return config, rows, summary


def test_wandb_holds_hyperparameters_rows_and_the_result(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    arguments = ["optimizer=adamw", "tracker=wandb", "workload.target=5.4", f"records={tmp_path}"]
    run = load_run([*TINY_GPT2, *arguments])
    record, _ = run_trial(run, lambda: [make_tracker(run)])  # type: ignore[list-item]
    (folder,) = (record.folder / "wandb").glob("offline-run-*")
    config, rows, summary = read_wandb(folder)
    assert config["hyperparameters"]["lr"] == run.optimizer.effective_hyperparameters["lr"]
    assert config["target"] == 5.4 and config["tags"][0] == "gpt2"
    assert sorted(rows) == [row["global_step"] for row in record.rows]
    for row in record.rows:
        logged = rows[row["global_step"]]
        assert logged["validation/loss"] == row["validation/loss"]
        assert logged["validation/distance_to_target"] == pytest.approx(row["validation/loss"] - 5.4)
        assert logged["clock/submission"] == row["accumulated_submission_time"] and logged["train/lr"] >= 0
        assert not any(name.startswith("test/") for name in logged)
    assert record.manifest is not None and record.manifest.final is not None
    assert summary["status"] == str(record.status)
    assert summary["steps_to_target"] == record.manifest.final.steps_to_target


def test_wandb_has_every_row_after_a_kill(tmp_path: Path) -> None:
    """The file of the resumed part has the rows of the first, which died in W&B's buffer with the process."""
    pytest.importorskip("wandb")
    run = load_run([*TINY_GPT2, "optimizer=adamw", "tracker=wandb", "checkpoint_seconds=0", f"records={tmp_path}"])
    record = stopped(lambda *_, **__: run_trial(run)[0])
    finished, _ = run_trial(run, lambda: [make_tracker(run)])  # type: ignore[list-item]
    (folder,) = (record.folder / "wandb").glob("offline-run-*")
    assert sorted(read_wandb(folder)[1]) == [3, 6, 9, 12] == [row["global_step"] for row in finished.rows]


def test_wandb_offline_with_an_id_that_a_resume_finds(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = load_run([*TINY_GPT2, "optimizer=adamw", "tracker=wandb", f"records={tmp_path}"])
    trackers = [make_tracker(run), make_tracker(run)]
    record, _ = run_trial(run, lambda: [trackers[0]])  # type: ignore[list-item]
    folders = list((record.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    again = run.model_copy(update={"overwrite": True})
    run_trial(again, lambda: [trackers[1]])  # type: ignore[list-item]
    # Not the folders' names: of two that start in the same second, one gets a number at the end.
    paths = list((record.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    assert json.loads(record.path.manifest.read_text())["status"] == "exhausted"


def test_tensorboard_holds_the_rows(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = load_run([*TINY_GPT2, "optimizer=adamw", "tracker=tensorboard", f"records={tmp_path}"])
    tracker = make_tracker(run)
    record, _ = run_trial(run, lambda: [tracker])  # type: ignore[list-item]
    log = events.EventAccumulator(str(record.folder / "tensorboard"))
    log.Reload()
    logged = [(event.step, event.value) for event in log.Scalars("validation/loss")]
    assert logged == [(row["global_step"], pytest.approx(row["validation/loss"])) for row in record.rows]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    run = load_run(["workload=gpt2", "optimizer=adamw", "tracker=wandb"])
    with pytest.raises(UserError, match=r"pip install -e '.\[wandb\]'"):
        make_tracker(run)
