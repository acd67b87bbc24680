"""Trials that several processes share, with gloo on the CPU: N = 1, 2 and 4 give the same steps and the same curves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from harness.config.compose import load_run
from harness.errors import UserError
from harness.interface.ranks import Ranks, communication_backend
from harness.records.layout import RecordPath
from harness.trial.distributed import init_distributed
from harness.trial.record import Record
from harness.trial.trial import check_ranks, run_trial
from tests.conftest import TINY_GPT2
from tests.forked import ForkedProcess
from tests.harness import rank_program
from tests.harness.manifests import FROM_THE_RUN, manifest_content
from tests.processes import join, wait_until

pytestmark = pytest.mark.xdist_group("ranks")
ROOT = Path(__file__).parents[3]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCHER, f"--nproc_per_node={ranks}", *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def launch(ranks: int, module: str, *arguments: str, **environment: str) -> tuple[list[int], str]:
    """What torchrun does, with processes that need not load torch: a store and places in the environment, and the
    others are asked to end when one fails. The statuses, and what all wrote to standard error."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    processes, threads, errors = [], [], []
    for rank in range(ranks):
        place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = ForkedProcess(module, *arguments, env=os.environ | environment | place)
        process.stdin.close()
        processes.append(process)
        threads.append(threading.Thread(target=lambda process=process: errors.append(process.communicate()[1])))
        threads[-1].start()
    # At the first failure, or when all have ended.
    wait_until(lambda: any(statuses := [process.poll() for process in processes]) or None not in statuses)
    if any(process.poll() for process in processes):
        for process in processes:
            process.send_signal(signal.SIGTERM)
    join(*threads)
    return [process.wait() for process in processes], "".join(errors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of what rank_program.py leaves, by number of processes."""
    folders = {}
    for ranks in (1, 2, 4):
        folder = folders[ranks] = tmp_path_factory.mktemp(f"ranks_{ranks}")
        if ranks == 1:
            rank_program.main(folder)
        else:
            statuses, errors = launch(ranks, rank_program.__name__, str(folder))
            assert statuses == [0] * ranks, errors
    return folders


def read(folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    (manifest,) = folder.rglob("manifest.json")
    keys = ("global_step", "train/loss", "validation/loss", "validation/num_examples", "examples", "forward_examples")
    with (manifest.parent / "eval_measurements.csv").open() as file:
        rows = [{key: float(row[key]) for key in keys} for row in csv.DictReader(file)]
    return rows, json.loads(manifest.read_text())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("examples", [16, 14, 8, 3])
def test_a_step_offers_the_same_whatever_the_number_of_ranks(
    folders: dict[int, Path], ranks: int, examples: int
) -> None:
    """Fewer micro-batches than ranks and an uneven last one among them; buffers to the bit, sums up to their order."""
    alone, shared = (torch.load(folders[n] / f"step_{examples}.pt") for n in (1, ranks))
    assert alone.keys() == shared.keys()
    for name, expected in alone.items():
        shared_value = shared[name]
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (expected, shared_value)), strict=True):
            if name.startswith("buffers") or name == "counters":
                assert torch.equal(a, b), name
            else:
                torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("workload", "ranks"), [("gpt2", 2), ("gpt2", 4), ("resnet", 2)])
def test_the_curve_is_the_same(folders: dict[int, Path], workload: str, ranks: int) -> None:
    alone, of_one = read(folders[1] / workload)
    shared, of_several = read(folders[ranks] / workload)
    assert len(alone) == len(shared) > 1
    for a, b in zip(alone, shared, strict=True):
        assert b == pytest.approx(a, rel=2e-5)
    assert of_several["status"] == of_one["status"] == "exhausted"
    assert of_several["machine"]["ranks"] == ranks and of_one["machine"]["ranks"] == 1


def test_compressed_gradients_train_too(folders: dict[int, Path]) -> None:
    """vit with PowerSGD, which exchanges the gradients itself: its first two steps are plain, hence the same."""
    alone, _ = read(folders[1] / "vit")
    shared, manifest = read(folders[2] / "vit")
    assert shared[0] == pytest.approx(alone[0], rel=2e-5)
    assert all(
        row["train/loss"] == pytest.approx(expected["train/loss"], rel=0.1)
        for row, expected in zip(shared, alone, strict=True)
    )
    assert manifest["needs"] == ["communication"]


def test_a_submission_of_algoperf_is_wrapped_and_the_curve_is_the_same(tmp_path: Path) -> None:
    """Its gradients are averaged by DistributedDataParallel, with sums of the loss over the processes."""
    path = ROOT / "tests" / "data" / "algoperf" / "adamw" / "submission.py"
    options = ["workload.micro_batch=2", "optimizer=algoperf", f"optimizer.path={path}"]
    trials = {"gpt2": [*TINY_GPT2, *options]}
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    rank_program.run_all(trials, tmp_path / "one")
    statuses, errors = launch(2, rank_program.__name__, str(tmp_path / "two"), str(tmp_path / "trials.json"))
    assert statuses == [0, 0], errors
    (alone, _), (shared, manifest) = read(tmp_path / "one"), read(tmp_path / "two")
    assert len(alone) == len(shared) > 1 and manifest["machine"]["ranks"] == 2
    for a, b in zip(alone, shared, strict=True):
        assert b == pytest.approx(a, rel=2e-5)


def test_a_lost_rank_ends_the_trial_as_failed_and_the_same_command_continues_to_the_same_bits(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    command = [*rank_program.TRIALS["gpt2"], f"records={tmp_path}", "machine=here", "checkpoint_seconds=0"]
    first = torchrun(2, "run.py", *command, PACEMARK_TEST_FAULT="killed")
    rows, manifest = read(tmp_path)
    assert first.returncode != 0 and manifest["status"] == "failed", first.stderr
    assert manifest["final"]["lost_ranks"] == [1] and len(rows) == 2
    # The same where rank 0 hears neither signals nor exceptions, as under NCCL.
    statuses, errors = launch(2, "run", *command, PACEMARK_TEST_FAULT="killed and deaf")
    rows, manifest = read(tmp_path)
    assert statuses == [1, -signal.SIGKILL] and manifest["status"] == "failed", errors
    assert manifest["final"]["lost_ranks"] == [1] and "failed: lost rank 1; the same command" in errors
    assert len(rows) == 2 and not list(tmp_path.rglob(".lease*"))
    statuses, errors = launch(2, "run", *command)
    assert statuses == [0, 0], errors
    rows, manifest = read(tmp_path)
    undisturbed, expected = read(folders[2] / "gpt2")
    assert rows == undisturbed
    assert manifest["final"]["weights_sha256"] == expected["final"]["weights_sha256"]
    assert len(manifest["failures"]) == 2


def test_an_exception_on_one_rank_is_told_by_the_record_and_stops_no_sweep_for_good(tmp_path: Path) -> None:
    command = ["-m", *rank_program.TRIALS["gpt2"], "label=one,other", f"records={tmp_path}"]
    statuses, _ = launch(2, "run", *command, PACEMARK_TEST_FAULT="broken")
    (manifest,) = tmp_path.rglob("manifest.json")
    final = json.loads(manifest.read_text())["final"]
    assert any(statuses)
    assert final["traceback"].startswith("on rank 1 of 2") and "ArithmeticError: only here" in final["traceback"]
    assert "lost_ranks" not in final
    launch(2, "run", *command)
    assert sorted(json.loads(path.read_text())["status"] for path in tmp_path.rglob("manifest.json")) == [
        "exhausted",
        "failed",
    ]


def test_a_checkpoint_of_ranks_that_differ_asks_for_as_many(tmp_path: Path) -> None:
    run = load_run([*TINY_GPT2, "optimizer=powersgd", f"records={tmp_path}", "machine=here", "checkpoint_seconds=0"])
    record = Record.load(run, RecordPath.of_run(run, "here"))
    values = manifest_content()
    record.acquire()
    record.start({key: values[key] for key in values.keys() - FROM_THE_RUN})
    record.save_checkpoint({"training": {"of_ranks": [{}, {}]}})
    record.close()
    with pytest.raises(UserError, match=r"of 2 processes.*there are now 1; start 2"):
        run_trial(run)


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ("3", ["optimizer=adamw", "workload.micro_batch=2"], "start as many as divide 4"),
        ("2", ["optimizer=any", "optimizer.class_path=tests.harness.seams.LayerInputs", "workload.micro_batch=2"],
         "start one process instead of 2"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share_is_said_before_they_meet(
    size: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=message):
        run_trial(load_run([*TINY_GPT2, *arguments, "schedule.shape=constant", f"records={tmp_path}"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_contiguous_even_and_complete(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [k for share in shares for k in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gpus_without_nccl_are_told_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    run = load_run([*TINY_GPT2, "optimizer=sgd", "workload.micro_batch=4"])
    with pytest.raises(UserError, match=r"device=auto: 2 processes on GPUs .* NCCL, which torch .* is built without"):
        check_ranks(run)
    check_ranks(run.model_copy(update={"device": "cpu"}))
    assert communication_backend() == "gloo"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    check_ranks(run)
    assert communication_backend() == "cpu:gloo,cuda:nccl"


def test_ranks_that_cannot_meet_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"the 2 processes of the launcher cannot meet \(.*RANK.*\); start them all with"
    ):
        init_distributed()
