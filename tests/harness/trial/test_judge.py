"""judge=process: the same results as without a judge, and what happens when one of the two processes ends."""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness.config.compose import load_run
from harness.errors import UserError
from harness.records.layout import SOURCES, WEIGHTS_AT_END, WEIGHTS_AT_TARGET
from harness.trial import remote_training
from harness.trial.record import Record, Status
from harness.trial.trial import run_trial
from tests import forked
from tests.conftest import TINY_GPT2, TINY_RESNET
from tests.harness.outcomes import read_outcome
from tests.harness.trial.test_trial import seam
from tests.processes import ROOT, wait_until

Trial = Callable[..., Record]
JUDGED = "judge=process"
LONG_EVALUATION = "workload.data={blocks: 200, evaluation_examples: 20000, evaluation_batch: 100}"


@pytest.fixture
def forked_trainee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_training, "launch", forked.launch_trainee)


@pytest.mark.parametrize(
    ("base", "optimizer", "arguments"),
    [
        (TINY_GPT2, "schedule_free_adamw", []),
        (TINY_GPT2, "any", seam("OwnCompilation")),
        (TINY_GPT2, "sam", ["precision=bf16", "workload.target=5.53"]),
        (TINY_RESNET, "ema", []),
    ],
)
def test_the_results_are_the_same_to_the_bit(
    trial: Trial, forked_trainee: None, fashion_mnist_data: Any, base: list[str], optimizer: str, arguments: list[str]
) -> None:
    alone = trial(*arguments, "label=alone", base=base, optimizer=optimizer)
    judged = trial(*arguments, "label=judged", JUDGED, base=base, optimizer=optimizer)
    expected, outcome = read_outcome(alone.folder), read_outcome(judged.folder)
    assert outcome == expected
    evidence = judged.manifest.evidence
    assert evidence.judge == "process" and not evidence.model_changes and not evidence.tampered
    assert evidence.model_sha256 == alone.manifest.evidence.model_sha256
    assert evidence.initial_weights_sha256 == evidence.built_weights_sha256
    row = judged.rows[-1]
    assert row["counted_forward_examples"] == row["forward_examples"] > 0
    assert row["off_clock_forward_examples"] == row["off_clock_changes"] == 0
    charged = row["accumulated_submission_time"]
    # The second clock has the messages in it besides.
    assert charged <= row["accumulated_second_clock_time"]


def test_a_judged_trial_resumes_to_the_same_bits(
    trial: Trial, forked_trainee: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trial("label=whole", JUDGED, optimizer="nadamw")
    segment, count = remote_training.RemoteTraining.measured_segment, 0

    def interrupted(self: Any, goal: int, charge_compile: bool) -> float:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return segment(self, goal, charge_compile)

    arguments = ("label=cut", JUDGED, "checkpoint_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(remote_training.RemoteTraining, "measured_segment", interrupted)
        assert trial(*arguments, optimizer="nadamw").status is Status.STOPPED
    resumed = trial(*arguments, optimizer="nadamw")
    assert read_outcome(resumed.folder) == read_outcome(whole.folder)
    lives = resumed.manifest.evidence.lives
    assert [life.first_row for life in lives] == [0, 2] and all(life.seconds > 0 for life in lives)
    assert resumed.rows[-1]["accumulated_second_clock_time"] > resumed.rows[1]["accumulated_second_clock_time"]


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("LeavesWell", Status.FAILED, "ended with status 0"),
        ("Aborts", Status.FAILED, "SIGABRT"),
        ("Raises", Status.FAILED, "ZeroDivisionError"),
        ("Exits", Status.FAILED, "SystemExit"),
        ("NeedsMemory", Status.OUT_OF_MEMORY, "can't allocate memory"),
        ("OtherShapes", Status.FAILED, "do not fit the model"),
    ],
)
def test_a_submission_that_ends_its_process_ends_the_trial(
    trial: Trial, forked_trainee: None, name: str, status: Status, words: str
) -> None:
    record = trial(JUDGED, f"optimizer.class_path=tests.harness.trial.endings.{name}", optimizer="any")
    assert record.status is status
    assert words in record.manifest.final.traceback


@pytest.mark.parametrize("step", ["0", "6"])
def test_a_submission_that_is_killed_from_outside_goes_on_to_the_same_bits(
    trial: Trial, forked_trainee: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv("PACEMARK_TEST_STEP", step)
    monkeypatch.setenv("PACEMARK_TEST_FOLDER", str(tmp_path))
    arguments = (JUDGED, "checkpoint_seconds=0", "optimizer.class_path=tests.harness.trial.endings.IsKilled")
    record = trial("label=cut", *arguments, optimizer="any")
    assert record.status is Status.STOPPED and "SIGKILL" in record.manifest.final.stop_reason
    resumed = trial("label=cut", *arguments, optimizer="any")
    assert resumed.status is Status.EXHAUSTED and not resumed.manifest.failures
    monkeypatch.setenv("PACEMARK_TEST_STEP", "1000")
    whole = trial("label=whole", *arguments, optimizer="any")
    assert read_outcome(resumed.folder) == read_outcome(whole.folder)


def test_mistakes_of_the_configuration_are_told_as_without_a_judge(trial: Trial, forked_trainee: None) -> None:
    path = "tests.harness.trial.endings.Undeclared"
    run = load_run([*TINY_GPT2, "optimizer=adamw", "records=unused"])
    optimizer = run.optimizer.model_copy(update={"class_path": path})
    with pytest.raises(UserError, match="overrides select"):
        run_trial(run.model_copy(update={"optimizer": optimizer, "judge": "process"}))


def test_nothing_of_the_submission_runs_during_an_evaluation(tmp_path: Path) -> None:
    """In real processes: threads, children and what they have abandoned are stopped, and end with the trial."""
    record = run_real(tmp_path, "tests.harness.trial.endings.Busy", "workload.max_steps=6", LONG_EVALUATION)
    assert record["status"] == "exhausted"
    folder = next(tmp_path.rglob("trial_1"))
    ticks = [line.split() for line in (folder / "ticks.txt").read_text().splitlines()]
    assert {kind for kind, _ in ticks} == {"thread", "child", "orphan"}
    with (folder / "eval_measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    evaluation = float(rows[0]["accumulated_eval_time"])
    for wanted in ("thread", "child", "orphan"):
        times = [float(time) for kind, time in ticks if kind == wanted]
        gaps = sorted(b - a for a, b in itertools.pairwise(times))
        # It ticks far more often than an evaluation takes, and not while one is made.
        assert 5 * statistics.median(gaps) < 0.8 * evaluation < gaps[-1]
    for pid in map(int, (folder / "pids.txt").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "a copy of this process" in record["evidence"]["programs"]
    assert float(rows[-1]["accumulated_children_cpu_time"]) > 0


def test_the_submission_ends_with_a_judge_that_is_killed(tmp_path: Path) -> None:
    command = real_command(tmp_path, "tests.harness.trial.endings.KillsJudge", "workload.max_steps=6")
    environment = os.environ | {"PACEMARK_TEST_FOLDER": str(tmp_path)}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100, env=environment)
    # The worker that started the judge starts it again: a kill is no crash of the submission.
    assert process.returncode == 0
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert manifest["status"] == "exhausted" and not manifest.get("failures")
    pid = int(next(tmp_path.rglob("pids.txt")).read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_replay_keeps_the_weights_of_the_crossing_and_of_the_end(trial: Trial) -> None:
    record = trial("judge=replay", "workload.target=5.545", "run_to_end=true")
    kept = record.manifest.evidence.kept_weights
    assert set(kept) == {WEIGHTS_AT_TARGET, WEIGHTS_AT_END}
    assert kept[WEIGHTS_AT_TARGET].row < kept[WEIGHTS_AT_END].row == len(record.rows) - 1
    for name, entry in kept.items():
        state = torch.load(record.folder / name, weights_only=True)
        assert state and len(entry.sha256) == 64
    assert kept[WEIGHTS_AT_END].sha256 == record.manifest.final.weights_sha256


def test_sources_of_a_submission_are_kept(trial: Trial, forked_trainee: None) -> None:
    record = trial(JUDGED, *seam("Sam"), optimizer="any")
    sources = record.manifest.evidence.sources
    assert "tests.harness.seams" in sources and not any(name.startswith("harness.") for name in sources)
    texts = json.loads((record.folder / SOURCES).read_text())
    assert "class Sam" in texts["tests.harness.seams"]


def real_command(folder: Path, class_path: str, *arguments: str) -> list[str]:
    options = [*TINY_GPT2, "optimizer=any", f"optimizer.class_path={class_path}"]
    return [sys.executable, "run.py", *options, *arguments, JUDGED, f"records={folder}", "machine=here"]


def run_real(folder: Path, class_path: str, *arguments: str) -> dict[str, Any]:
    environment = os.environ | {"PACEMARK_TEST_FOLDER": str(folder)}
    process = subprocess.run(
        real_command(folder, class_path, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=100,
        env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    manifest: dict[str, Any] = json.loads(next(folder.rglob("manifest.json")).read_text())
    return manifest
