"""One study through every executor, in deterministic mode, on their real local forms."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.compose import load_run
from harness.errors import UserError
from harness.study import executors, ledger
from harness.study.trial_process import Slot
from tests.conftest import TINY_GPT2

EXTERNAL = ["optimizer=adamw", "ruleset=external", "ruleset.studies=1", "ruleset.trials=3", "machine=here"]
SLURM = ["executor=slurm", "executor.options={cluster: local}", "executor.minutes=10"]
RAY = ["executor=ray", "executor.options={num_cpus: 2}"]


def execute(records: Path, *arguments: str) -> tuple[dict[int, Any], list[str]]:
    """Run the study; of each trial its point, its curve and its weights, and what the executor said."""
    said: list[str] = []
    entries = ledger.plan([load_run([*TINY_GPT2, *EXTERNAL, f"records={records}", *arguments])], "unused")
    executors.execute(entries, said.append)
    outcome = {}
    for entry in entries:
        manifest = json.loads((entry.path.folder / "manifest.json").read_text())
        with (entry.path.folder / "eval_measurements.csv").open() as file:
            curve = [(row["global_step"], row["train/loss"], row["validation/loss"]) for row in csv.DictReader(file)]
        assert manifest["preemption_count"] == 0 and len(curve) == 4
        assert manifest["config"]["executor"]["name"] == load_run([*TINY_GPT2, *EXTERNAL, *arguments]).executor.name
        outcome[entry.path.trial] = (manifest["hyperparameters"], curve, manifest["final"]["weights_sha256"])
    return outcome, said


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    outcome, _ = execute(tmp_path_factory.mktemp("local"), "executor.workers=2")
    assert len({str(point) for point, _, _ in outcome.values()}) == 3
    return outcome


def test_slurm_gives_the_same_results(local: dict[int, Any], tmp_path: Path) -> None:
    outcome, said = execute(tmp_path, *SLURM, "executor.workers=2")
    assert outcome == local
    assert any("submitted 2 jobs" in line for line in said)


@pytest.fixture
def own_ray(tmp_path: Path) -> Iterator[None]:
    yield
    import ray

    assert not ray.is_initialized()


def test_ray_gives_the_same_results(local: dict[int, Any], tmp_path: Path, own_ray: None) -> None:
    outcome, _ = execute(tmp_path, *RAY, "executor.workers=2")
    assert outcome == local


def test_an_error_of_the_user_comes_through_every_executor(tmp_path: Path) -> None:
    for executor in ([], SLURM, RAY):
        with pytest.raises(UserError, match="/nonexistent"):
            execute(tmp_path / str(len(executor)), *executor, "data=/nonexistent", "ruleset.trials=1")


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_package_that_is_missing_is_named(
    executor: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"executor={executor}.*pip install -e '.\[{executor}\]'"):
        execute(tmp_path, f"executor={executor}")


def test_a_slurm_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"executor=slurm.*sbatch works.*executor=local"):
        execute(tmp_path, "executor=slurm", "executor.options={cluster: slurm}")


def test_a_ray_cluster_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"executor=ray: nothing answers at .*127\.0\.0\.1:1"):
        execute(tmp_path, "executor=ray", "executor.options={address: '127.0.0.1:1'}")
    with pytest.raises(UserError, match="executor=ray: cannot start or join"):
        execute(tmp_path, "executor=ray", "executor.options={adress: auto}")


def test_every_worker_has_cores_of_its_own_and_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 8})
    run = load_run([*TINY_GPT2, *EXTERNAL, "device=cpu", "threads=2"])
    said: list[str] = []
    assert executors.assign_slots(run, 2, said.append) == [Slot(cores=(2, 3)), Slot(cores=(5, 8))] and not said
    assert executors.assign_slots(run, 3, said.append) == [Slot()] * 3
    assert "executor.workers=3 with threads=2 share 4 cores" in said[0]


def test_every_worker_has_a_gpu_of_its_own_and_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    run = load_run([*TINY_GPT2, *EXTERNAL])
    said: list[str] = []
    assert executors.assign_slots(run, 2, said.append) == [Slot(gpu="4"), Slot(gpu="6")] and not said
    assert executors.assign_slots(run, 3, said.append)[2] == Slot(gpu="4")
    assert "share 2 GPUs" in said[0]
