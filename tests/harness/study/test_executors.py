"""One study through every executor, in deterministic mode, on their real local forms."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import log
from harness.config.compose import load_run
from harness.errors import UserError
from harness.study import executors, ledger, slurm
from harness.study.trial_process import Slot, TrialProcess
from tests import forked
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialProcess, "_start", staticmethod(forked.start_trial))
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


def test_an_error_of_the_user_comes_through_every_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialProcess, "_start", staticmethod(forked.start_trial))
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


class EndedJob:
    """A job of submitit that has ended, without a cluster. error: what its result raises."""

    def __init__(self, job_id: str, looks: int = 0, state: str = "COMPLETED", error: Exception | None = None) -> None:
        self.job_id, self.state, self._looks, self._error = job_id, state, looks, error

    def done(self) -> bool:
        """After so many looks."""
        self._looks -= 1
        return self._looks < 0

    def result(self) -> None:
        """As submitit has it."""
        if self._error is not None:
            raise self._error


def wait_for(*jobs: EndedJob) -> list[str]:
    reported: list[str] = []
    slurm.wait_for_jobs(jobs, pytest.importorskip("submitit.core.utils"), reported.append)
    return reported


def test_a_job_that_was_taken_away_is_told_and_the_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("submitit.core.utils")
    monkeypatch.setattr(slurm, "JOB_POLL_SECONDS", 0)
    lost = errors.UncompletedJobError("Job 5_0 has not produced any output\nTraceback ...\nKeyboardInterrupt")
    last = EndedJob("5_3", looks=4)
    late = errors.FailedJobError("... UncompletedJobError: Job not requeued because: timed-out too many times.")
    assert wait_for(
        EndedJob("5_0", 1, "CANCELLED by 1000", lost),
        EndedJob("5_1", 2, "UNKNOWN", lost),
        EndedJob("5_2", 3, "RUNNING", late),
        last,
    ) == [
        "job 5_0 was cancelled; 3 still run; the same command continues",
        "job 5_1 was cancelled or its node was lost; 2 still run; the same command continues",
        "job 5_2 was out of time too often; 1 still runs; the same command continues",
    ]
    assert last.done()
    assert wait_for(EndedJob("7_0", 0, "PREEMPTED", lost)) == [
        "job 7_0 was preempted; none is left; the same command continues"
    ]
    with pytest.raises(UserError, match=r"executor=slurm: job 6_0 failed: .*data=/nonexistent"):
        wait_for(EndedJob("6_0", 0, "COMPLETED", errors.FailedJobError("Traceback ... UserError: data=/nonexistent")))


def test_submitit_says_only_once_that_accounting_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    theirs = logging.getLogger("submitit")
    for level, lines in (("WARNING", 0), ("INFO", 1)):
        monkeypatch.setenv(log.VARIABLE, level)
        log.configure()
        with slurm._quiet_submitit():
            for call in range(3):
                theirs.warning(f"Call #{call} - Bypassing sacct error, status may be inaccurate.")
            theirs.warning("something else")
        printed = "".join(capsys.readouterr()).splitlines()
        assert sum("sacct does not answer" in line for line in printed) == lines == len(printed) - 1
        assert printed[-1].endswith("WARNING harness.study.slurm: submitit: something else")
    monkeypatch.undo()
    log.configure()


def test_every_worker_has_cores_of_its_own_and_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 8})
    run = load_run([*TINY_GPT2, *EXTERNAL, "device=cpu", "threads=2"])
    reported: list[str] = []
    assert executors.assign_slots(run, 2, reported.append) == [Slot(cores=(2, 3)), Slot(cores=(5, 8))] and not reported
    assert executors.assign_slots(run, 3, reported.append) == [Slot()] * 3
    assert "executor.workers=3 with threads=2 share 4 cores" in reported[0]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1"]),
        ("4,6", ["4", "6"]),
        ("GPU-8f,GPU-b3", ["GPU-8f", "GPU-b3"]),
        ("MIG-a,MIG-b", ["MIG-a", "MIG-b"]),
    ],
)
def test_every_worker_has_a_gpu_of_its_own_and_says_when_it_cannot(
    visible: str | None, names: list[str], two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = load_run([*TINY_GPT2, *EXTERNAL])
    reported: list[str] = []
    first, second = Slot(gpu=names[0]), Slot(gpu=names[1])
    assert executors.assign_slots(run, 2, reported.append) == [first, second] and not reported
    assert executors.assign_slots(run, 3, reported.append) == [first, second, first]
    assert "executor.workers=3 share 2 GPUs" in reported[0]


def test_workers_that_share_the_one_gpu_that_was_named_are_told(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run([*TINY_GPT2, *EXTERNAL, "device=cuda:1"])
    reported: list[str] = []
    assert executors.assign_slots(run, 1, reported.append) == [Slot()] and not reported
    assert executors.assign_slots(run, 2, reported.append) == [Slot(), Slot()]
    assert "executor.workers=2 share device=cuda:1: their seconds disturb each other" in reported[0]


@pytest.mark.parametrize("hidden", ["-1", ""])
def test_hidden_gpus_leave_the_workers_their_cores(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    reported: list[str] = []
    slots = executors.assign_slots(load_run([*TINY_GPT2, *EXTERNAL]), 2, reported.append)
    assert slots == [Slot(cores=(0,)), Slot(cores=(1,))] and not reported


SINFO = "cpu*|(null)\ngpu|gpu:a100:4(S:0-1)\nmixed|(null)\nmixed|lustre:1,gpu:4\n"


@pytest.mark.parametrize(
    ("partitions", "have_gpus"),
    [("", {False}), ("gpu", {True}), ("mixed", {True, False}), ("cpu, gpu", {True, False}), ("absent", set())],
)
def test_the_nodes_of_a_partition_tell_whether_they_have_gpus(partitions: str, have_gpus: set[bool]) -> None:
    assert slurm.parse_node_gpus(SINFO, partitions) == have_gpus


def wants_slurm_gpu(folder: Path, device: str, options: dict[str, Any], sinfo: str | None) -> tuple[bool, list[str]]:
    """Whether a job asks for a GPU where sinfo prints so, or is not there (None); and what is reported."""
    reported: list[str] = []
    if sinfo is not None:
        (folder / "sinfo").write_text(f"#!/bin/sh\ncat <<'END'\n{sinfo}END\n")
        (folder / "sinfo").chmod(0o755)
    run = load_run([*TINY_GPT2, *EXTERNAL, f"device={device}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:/bin:/usr/bin" if sinfo is not None else str(folder))
        return slurm._wants_slurm_gpu(run, None, options, reported.append), reported


def test_slurm_jobs_ask_for_a_gpu_where_the_nodes_have_one(tmp_path: Path) -> None:
    for device, options, expected in [
        ("auto", {}, False),
        ("auto", {"slurm_partition": "gpu"}, True),
        ("cpu", {"slurm_partition": "gpu"}, False),
        ("cuda", {}, True),
        # The user asks in words of submitit.
        ("auto", {"slurm_partition": "gpu", "slurm_gres": "gpu:1"}, False),
    ]:
        assert wants_slurm_gpu(tmp_path, device, options, SINFO) == (expected, []), (device, options)
    with pytest.raises(UserError, match=r"device=auto: of the nodes of mixed only some have GPUs; give device=cuda"):
        wants_slurm_gpu(tmp_path, "auto", {"slurm_partition": "mixed"}, SINFO)


def test_a_slurm_that_does_not_list_its_nodes_is_told(tmp_path: Path) -> None:
    wanted, reported = wants_slurm_gpu(tmp_path, "auto", {}, None)
    assert not wanted and "device=auto: sinfo does not tell" in reported[0]


class FakeRay:
    """A Ray cluster with so many GPUs, which runs nothing: only what its tasks ask for is kept."""

    def __init__(self, gpus: int) -> None:
        self.gpus, self.asked = gpus, {}
        self.exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, **asked: int) -> Callable[[object], object]:
        self.asked = asked
        return lambda _: SimpleNamespace(remote=lambda trials: None)

    def init(self, **_: object) -> None: ...
    def get(self, references: list[object]) -> None: ...
    def shutdown(self) -> None: ...


@pytest.mark.parametrize(("device", "gpus", "asked"), [("auto", 0, 0), ("auto", 4, 1), ("cpu", 4, 0), ("cuda", 4, 1)])
def test_ray_tasks_ask_for_a_gpu_where_the_cluster_has_one(
    device: str, gpus: int, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(gpus)
    monkeypatch.setitem(sys.modules, "ray", ray)
    arguments = [*TINY_GPT2, *EXTERNAL, "executor=ray", "executor.workers=2", f"device={device}", f"records={tmp_path}"]
    reported: list[str] = []
    executors.execute(ledger.plan([load_run(arguments)], "unused"), reported.append)
    assert (ray.asked["num_gpus"], reported) == (asked, [])


def test_a_ray_cluster_without_a_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(0))
    with pytest.raises(UserError, match="device=cuda: the Ray cluster has no GPU; use device=cpu"):
        execute(tmp_path, "executor=ray", "device=cuda")
