from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.errors import UserError
from harness.trial.trackers import make_tracker
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2


def test_wandb_offline_with_an_id_that_a_resume_finds(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = load_run([*TINY_GPT2, "optimizer=adamw", "tracker=wandb", f"records={tmp_path}"])
    trackers = [make_tracker(run), make_tracker(run)]
    record, _ = run_trial(run, lambda: [trackers[0]])  # type: ignore[list-item]
    folders = list((record.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    again = run.model_copy(update={"overwrite": True})
    run_trial(again, lambda: [trackers[1]])  # type: ignore[list-item]
    ids = {folder.name.rpartition("-")[2] for folder in (record.folder / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
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
