"""Every configuration of scale=full, from the source files to the last row: tiny copies of the data, tiny models."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.compose import load_run
from harness.errors import UserError
from harness.scoring.load_records import load_records
from harness.trial.record import Record, Status
from harness.trial.training import Training
from tests import processes
from tests.harness import rank_program
from tests.harness.outcomes import read_outcome
from tests.harness.trial.test_distributed import launch
from tests.harness.trial.test_distributed import read as read_shared
from tests.harness.trial.test_trial import interrupted
from workloads.data import prepared

from . import copies

# One of them needs the device that is simulated for these.
pytestmark = pytest.mark.xdist_group("simulated_cuda")
STEPS = ["workload.max_steps=4", "workload.eval_every=2", "workload.nominal_batch=8", "workload.micro_batch=4"]
IMAGES = ["workload.data.test_size=4", "workload.data.image=24", "workload.data.resize=28", "workload.target=1.1"]
TRIALS = {
    "resnet": ["workload=resnet", "workload.model.width=4", "workload.data.validation_size=20", "workload.target=1.1"],
    "resnet_imagenet": ["workload=resnet", "variant=imagenet", "workload.model.width=4", *IMAGES],
    "vit": ["workload=vit", "workload.model.width=16", "workload.model.heads=2", "workload.model.layers=2",
            "workload.model.image=24", "workload.model.patch=8", *IMAGES],
    "gpt2": ["workload=gpt2", "workload.model.width=8", "workload.model.heads=2", "workload.model.layers=2",
             "workload.model.context=16", "workload.data.evaluation_examples=8", "workload.data.evaluation_batch=4",
             "workload.target=0.1"],
}  # fmt: skip
Trial = Callable[..., Record]


def prepare(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return processes.call("prepare_data", *arguments, "--root", root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three data sets, prepared by the script."""
    folder = tmp_path_factory.mktemp("full")
    sources = {
        "cifar10": copies.cifar_archive(folder / "cifar", copies.cifar_images()),
        "imagenet": copies.imagenet_folder(folder / "imagenet_copy", copies.imagenet_pictures()),
        "openwebtext": copies.text_parquet(folder / "text", copies.pages(6000), files=2),
    }
    for name, source in sources.items():
        if name == "openwebtext":
            pytest.importorskip("tiktoken")
        done = prepare(name, "--source", str(source), "--partial", "--workers", "1", root=folder)
        assert done.returncode == 0, done.stderr
        assert "runs on it are marked as modified" in done.stdout and f"add data={folder}" in done.stdout
    return folder


@pytest.mark.parametrize("name", TRIALS)
def test_every_full_configuration_trains_and_resumes_to_the_same_bits(trial: Trial, root: Path, name: str) -> None:
    base = ["scale=full", f"data={root}", *STEPS, *TRIALS[name]]
    uninterrupted = trial("label=whole", base=base)
    assert uninterrupted.status is Status.EXHAUSTED, uninterrupted.manifest.final.traceback
    assert [row["global_step"] for row in uninterrupted.rows] == [2, 4]
    assert uninterrupted.rows[-1]["test/loss"] > 0
    assert read_outcome(interrupted(trial, "label=cut", base=base).folder) == read_outcome(uninterrupted.folder)
    # ResNet-50 on ImageNet is scored as a separate workload.
    assert "variant_of" not in uninterrupted.manifest
    # Incomplete data: the record states it, is stored separately, and no table takes it.
    data = uninterrupted.manifest.data
    assert data["source"] == "prepared" and data["published"].startswith("no: ") and len(data["content"]) == 64
    assert uninterrupted.manifest.modified[-1] == "data" and "full-modified-" in str(uninterrupted.folder)
    with pytest.raises(UserError, match="facts of their workload were overridden"):
        load_records([uninterrupted.run.records])
    # The same bits without reading ahead.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_prefetch", lambda self: None)
        assert read_outcome(trial("label=plain", base=base).folder) == read_outcome(uninterrupted.folder)


def test_on_a_gpu_no_step_makes_the_host_wait(
    simulated_cuda: Callable[..., dict[str, dict[str, Any]]], root: Path, tmp_path: Path
) -> None:
    trials = {
        name: ["scale=full", f"data={root}", *STEPS, *more, "optimizer=adamw", f"records={tmp_path / name}"]
        for name, more in TRIALS.items()
    }
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    results = simulated_cuda("trials", str(tmp_path / "trials.json"))
    assert list(results) == list(TRIALS)
    for name, result in results.items():
        for trial_ in result.values():
            assert trial_["status"] == "exhausted", trial_["traceback"]
            assert trial_["waits"] == {}, name
        assert result["cut"]["rows"][-1]["train/loss"] == result["whole"]["rows"][-1]["train/loss"], name


def test_two_processes_give_the_same_curves(trial: Trial, root: Path, tmp_path: Path) -> None:
    trials = {name: ["scale=full", f"data={root}", *STEPS, *more, "optimizer=adamw"] for name, more in TRIALS.items()}
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    statuses, errors = launch(2, rank_program.__name__, str(tmp_path / "shared"), str(tmp_path / "trials.json"))
    assert statuses == [0, 0], errors
    for name, arguments in trials.items():
        shared, manifest = read_shared(tmp_path / "shared" / name)
        assert manifest["status"] == "exhausted" and manifest["machine"]["ranks"] == 2
        single = trial("label=alone", base=arguments).rows
        assert [row["global_step"] for row in single] == [2, 4]
        for expected, row in zip(single, shared, strict=True):
            assert row == pytest.approx({key: expected[key] for key in row}, rel=1e-4), name


def test_only_the_default_order_is_read_ahead(trial: Trial, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workloads.gpt2 import GPT2

    prefetched: list[torch.Tensor] = []
    used: list[torch.Tensor] = []
    batch = GPT2.batch
    monkeypatch.setattr(GPT2, "prefetch", lambda self, indices, keys: prefetched.append(indices))
    monkeypatch.setattr(GPT2, "batch", lambda self, i, k: used.append(i) or batch(self, i, k))
    base = ["scale=full", f"data={root}", *STEPS, *TRIALS["gpt2"]]
    trial(base=base)
    # From the second step on (the first batch is the warm-up's), each batch was announced two steps before.
    assert len(prefetched) == 8
    assert all(torch.equal(a, b) for a, b in zip(prefetched[::2], used[2:], strict=False))
    prefetched.clear()
    growing_batch = "optimizer.class_path=tests.harness.seams.GrowingBatch"
    trial(growing_batch, "schedule=constant", "schedule.warmup_fraction=0", base=base, optimizer="any")
    assert not prefetched


def test_a_trial_does_not_resume_with_other_data(trial: Trial, root: Path, tmp_path: Path) -> None:
    base = ["scale=full", *STEPS, *TRIALS["resnet"]]
    trial(f"data={root}", base=base)
    manifest = trial(f"data={root}", base=base).path.manifest
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"status": "stopped"}))
    other = copies.cifar_folder(tmp_path / "copy", copies.cifar_images(30))
    assert prepare("cifar10", "--source", str(other), "--partial", root=tmp_path).returncode == 0
    with pytest.raises(UserError, match=r"holds a trial on other data \(content: .*label=NAME"):
        trial(f"data={tmp_path}", base=base)


def test_complete_data_are_no_modification(root: Path, tmp_path: Path) -> None:
    arguments = ["workload=resnet", "scale=full", "optimizer=adamw"]
    assert load_run([*arguments, f"data={root}"]).modified == ("data",)
    incomplete = prepared.read_manifest(root / "cifar10", "cifar10")
    (tmp_path / "cifar10").mkdir()
    prepared.finish_preparation(
        dataclasses.replace(incomplete, folder=tmp_path / "cifar10", complete=True, missing_data="")
    )
    assert load_run([*arguments, f"data={tmp_path}"]).modified == ()
    # The error is raised when the data are loaded.
    assert load_run([*arguments, "data=/nowhere"]).modified == ()


def test_the_same_command_checks_and_repairs(root: Path, tmp_path: Path) -> None:
    copy = copies.cifar_folder(tmp_path / "copy", copies.cifar_images())
    wrong = prepare("cifar10", "--source", str(copy), root=tmp_path)
    assert wrong.returncode == 2 and "error: --source: data_batch_1 has the MD5" in wrong.stderr
    command = ["cifar10", "--source", str(copy), "--partial"]
    done = prepare(*command, root=tmp_path)
    assert "prepared in" in done.stdout and "cifar10: 1 of 1 units done" in done.stderr
    path = tmp_path / "cifar10" / "test-images.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = prepare("cifar10", "--check", root=tmp_path)
    assert damaged.returncode == 2 and "test-images.npy has the SHA-256" in damaged.stderr
    repaired = prepare(*command, root=tmp_path)
    assert repaired.returncode == 0 and "preparing it again" in repaired.stderr and path.read_bytes() == content
    again = prepare("cifar10", "--check", root=tmp_path)
    assert again.returncode == 0 and "prepared before, all hashes match" in again.stdout
    # Every trial hashes a file with another time of modification, until it has been checked.
    os.utime(path, ns=(1, 1))
    assert hashed_on_opening(tmp_path) == [path]
    assert prepare("cifar10", "--check", root=tmp_path).returncode == 0
    assert hashed_on_opening(tmp_path) == []
    nothing = prepare("imagenet", "--check", root=tmp_path)
    assert nothing.returncode == 2 and "holds no prepared imagenet" in nothing.stderr


def hashed_on_opening(root: Path) -> list[Path]:
    hashed: list[Path] = []
    hash_file = prepared.hash_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "hash_file", lambda file: hashed.append(file) or hash_file(file))
        prepared.open_prepared("cifar10", str(root))
    return hashed
