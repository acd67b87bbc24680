"""A study from the command line, by workers that are killed again and again."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import TINY_GPT2

ROOT = Path(__file__).parents[1]
STUDY = [
    *TINY_GPT2, "optimizer=adamw", "ruleset=external", "ruleset.studies=2", "ruleset.trials=2", "machine=here",
    "workload.max_steps=240", "workload.eval_every=4", "checkpoint_seconds=0",
]  # fmt: skip


def command(records: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *STUDY, f"records={records}", *arguments]


def outcome(records: Path) -> dict[str, Any]:
    """Of every trial its point, its metrics at every evaluation, and its weights."""
    found = {}
    for path in records.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        with (path.parent / "eval_measurements.csv").open() as file:
            rows = [(row["global_step"], row["train/loss"], row["validation/loss"]) for row in csv.DictReader(file)]
        final = manifest["final"]["weights_sha256"]
        found["/".join(path.parts[-4:-1])] = (manifest["status"], manifest["hyperparameters"], rows, final)
    return found


def rows_written(records: Path) -> int:
    return sum(len(path.read_text().splitlines()) - 1 for path in records.rglob("eval_measurements.csv"))


def test_killed_workers_end_with_every_trial_once_and_the_same_results(tmp_path: Path) -> None:
    whole = subprocess.run(command(tmp_path / "whole", "executor.workers=2"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert "2 of 2" in whole.stdout or "missed" in whole.stdout
    expected = outcome(tmp_path / "whole")
    assert len(expected) == 4 and len({str(point) for _, point, _, _ in expected.values()}) == 4

    killed, moments, kills = tmp_path / "killed", random.Random(1), 0

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    workers = [start(), start()]
    while any(worker.poll() is None for worker in workers):
        if kills == 5:
            for worker in workers:
                assert worker.wait(300) == 0, worker.stderr
            break
        victim = moments.randrange(2)
        goal = rows_written(killed) + moments.randint(2, 40)
        while rows_written(killed) < goal and workers[victim].poll() is None:
            time.sleep(0.005)
        if workers[victim].poll() is None:
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            kills += 1
            workers[victim] = start()
    assert kills >= 3
    last = subprocess.run(command(killed), capture_output=True, text=True)
    assert last.returncode == 0 and "4 trials, 4 of them finished already" in last.stdout
    assert outcome(killed) == expected
    for folder in killed.rglob("trial_*"):
        assert sorted(path.name for path in folder.iterdir()) == ["eval_measurements.csv", "manifest.json"]
    interrupted = [json.loads(path.read_text())["preemption_count"] for path in killed.rglob("manifest.json")]
    assert sum(interrupted) >= 1


def test_an_interrupted_pool_stops_its_trials_and_continues(tmp_path: Path) -> None:
    arguments = ["executor.workers=2", "workload.max_steps=2000", "workload.eval_every=20"]
    pool = subprocess.Popen(command(tmp_path, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.rglob("checkpoint.pt"))) < 2:
        time.sleep(0.01)
        assert pool.poll() is None
    pool.send_signal(signal.SIGINT)
    _, errors = pool.communicate(timeout=120)
    assert pool.returncode == 130 and "the same command continues" in errors
    status = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "status.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert status.returncode == 0, status.stderr
    assert "2 planned, 2 interrupted" in " ".join(status.stdout.split()) or "2 interrupted" in status.stdout
    assert "0 running" in status.stdout
    assert not list(tmp_path.rglob(".lease.*"))
