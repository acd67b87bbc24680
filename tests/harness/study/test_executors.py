"""One study through every executor, in deterministic mode, on their real local forms."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.errors import UserError
from harness.study import executors, ledger
from harness.study.trial_process import Slot
from tests.conftest import TINY_GPT2
from tests.harness.outcomes import Outcome, read_outcome

pytestmark = pytest.mark.xdist_group("executors")
EXTERNAL = ["optimizer=adamw", "ruleset=external", "ruleset.studies=1", "ruleset.trials=2", "machine=here"]
SLURM = ["executor=slurm", "executor.options={cluster: local}", "executor.minutes=10"]
RAY = ["executor=ray", "executor.options={num_cpus: 2}"]


def execute(records: Path, *arguments: str) -> tuple[dict[int, Outcome], list[str]]:
    """Run the study; of each trial what must not depend on the executor, and the lines that the executor reported."""
    reported: list[str] = []
    entries = ledger.plan([load_run([*TINY_GPT2, *EXTERNAL, f"records={records}", *arguments])], "unused")
    executors.execute(entries, reported.append)
    outcomes = {}
    for entry in entries:
        manifest = json.loads(entry.path.manifest.read_text())
        outcome = outcomes[entry.path.trial] = read_outcome(entry.path.folder)
        assert manifest["preemption_count"] == 0 and len(outcome.rows) == 4
        assert manifest["config"]["executor"]["name"] == load_run([*TINY_GPT2, *EXTERNAL, *arguments]).executor.name
    return outcomes, reported


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    outcomes, _ = execute(tmp_path_factory.mktemp("local"), "executor.workers=2")
    assert len({str(outcome.hyperparameters) for outcome in outcomes.values()}) == 2
    return outcomes


def test_slurm_gives_the_same_results(local: dict[int, Outcome], tmp_path: Path) -> None:
    outcomes, reported = execute(tmp_path, *SLURM, "executor.workers=2")
    assert outcomes == local
    assert any("submitted 2 jobs" in line for line in reported)


@pytest.fixture
def ray_is_left_alone(tmp_path: Path) -> Iterator[None]:
    yield
    import ray

    assert not ray.is_initialized()


def test_ray_gives_the_same_results(local: dict[int, Outcome], tmp_path: Path, ray_is_left_alone: None) -> None:
    outcomes, _ = execute(tmp_path, *RAY, "executor.workers=2")
    assert outcomes == local


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
    reported: list[str] = []
    assert executors.assign_slots(run, 2, reported.append) == [Slot(cores=(2, 3)), Slot(cores=(5, 8))] and not reported
    assert executors.assign_slots(run, 3, reported.append) == [Slot()] * 3
    assert "executor.workers=3 with threads=2 share 4 cores" in reported[0]


def test_every_worker_has_a_gpu_of_its_own_and_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    run = load_run([*TINY_GPT2, *EXTERNAL])
    reported: list[str] = []
    assert executors.assign_slots(run, 2, reported.append) == [Slot(gpu="4"), Slot(gpu="6")] and not reported
    assert executors.assign_slots(run, 3, reported.append)[2] == Slot(gpu="4")
    assert "share 2 GPUs" in reported[0]
