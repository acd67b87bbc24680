"""CIFAR-10: every format gives the same arrays, and damaged data are refused."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch

from harness.config.compose import load_run
from harness.errors import PreparationError, WorkloadError
from harness.interface.workload import WorkloadSpec
from workloads.data import cifar10, prepared
from workloads.data.prepared import PreparedData
from workloads.resnet import ResNet

from . import copies
from .copies import Batches, ignore_progress

BATCHES = copies.cifar_images()
CPU = torch.device("cpu")


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The hashes and counts of the release are set to those of the copies."""
    sums = {name: hashlib.md5(copies.cifar_batch(*batch)).hexdigest() for name, batch in BATCHES.items()}
    monkeypatch.setattr(
        cifar10, "BATCHES", {"train": {n: sums[n] for n in copies.TRAIN}, "test": {n: sums[n] for n in copies.TEST}}
    )
    monkeypatch.setattr(cifar10, "COUNTS", {"train": 100, "test": 20})
    return BATCHES


def prepare(source: Path, root: Path, partial: bool = False) -> PreparedData:
    return cifar10.prepare(str(source), root, partial=partial, workers=1, report=ignore_progress)


FORMATS: dict[str, Callable[[Path, Batches], Path]] = {
    "folder": copies.cifar_folder,
    "archive": copies.cifar_archive,
    "parquet": copies.cifar_parquet,
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same(tmp_path: Path, released: Batches, form: str) -> None:
    data = prepare(FORMATS[form](tmp_path / "copy", released), tmp_path / "root")
    assert data.complete and data.counts == {"train": 100, "test": 20}
    loaded, splits = cifar10.load_splits(str(tmp_path / "root"))
    assert loaded == data and cifar10.load_splits(str(tmp_path / "root" / "cifar10"))[0] == data
    for split, names in (("train", copies.TRAIN), ("test", copies.TEST)):
        np.testing.assert_array_equal(splits[split].images, np.concatenate([released[name][0] for name in names]))
        assert splits[split].labels.tolist() == [label for name in names for label in released[name][1]]
        assert isinstance(splits[split].images, np.memmap) and splits[split].images.dtype == np.uint8
    other = prepare(copies.cifar_folder(tmp_path / "other", released), tmp_path / "again")
    assert data.content == other.content
    assert {k: v["sha256"] for k, v in data.files.items()} == {k: v["sha256"] for k, v in other.files.items()}


def test_the_source_may_be_the_archive_itself(tmp_path: Path, released: Batches) -> None:
    archive = copies.cifar_archive(tmp_path / "copy", released) / cifar10.ARCHIVE
    assert prepare(archive, tmp_path / "root").complete


def test_the_hub_by_datasets(tmp_path: Path, released: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` finds splits and files of a repository in the hub's form; here the repository is a folder."""
    copy = copies.cifar_parquet(tmp_path / "copy", released)
    monkeypatch.setattr(cifar10, "HUB", str(copy))
    data = cifar10.prepare("hub", tmp_path / "root", partial=False, workers=1, report=ignore_progress)
    assert data.complete and data.source == "hub"
    assert data.content == prepare(copy, tmp_path / "again").content


def test_the_error_of_an_unreachable_hub_names_the_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "HUB", str(tmp_path / "nothing"))
    with pytest.raises(PreparationError, match=r"--source hub: .*nothing cannot be downloaded.*--source FOLDER"):
        cifar10.prepare("hub", tmp_path / "root", partial=False, workers=1, report=ignore_progress)


# ---- incomplete and damaged sources --------------------------------------------------------------------------------


def test_a_wrong_hash_is_refused_without_partial(tmp_path: Path, released: Batches) -> None:
    copy = copies.cifar_folder(tmp_path / "copy", released)
    batch = copy / "cifar-10-batches-py" / "data_batch_3"
    images, labels = released["data_batch_3"]
    batch.write_bytes(copies.cifar_batch(images ^ 1, labels))
    expected = cifar10.BATCHES["train"]["data_batch_3"]
    with pytest.raises(PreparationError, match=rf"data_batch_3 has the MD5 .*{expected}.*--partial"):
        prepare(copy, tmp_path / "root")
    assert not (tmp_path / "root" / "cifar10" / "prepared.json").exists()
    data = prepare(copy, tmp_path / "root", partial=True)
    assert not data.complete and "data_batch_3" in data.missing_data
    assert data.fingerprint["published"] == "no: other MD5 than released: data_batch_3"


@pytest.mark.parametrize("damage", ["half", "empty", "code", "shape", "labels"])
def test_a_damaged_batch_is_named(tmp_path: Path, damage: str) -> None:
    """With --partial, which does not check hashes."""
    copy = copies.cifar_folder(tmp_path / "copy", BATCHES)
    batch = copy / "cifar-10-batches-py" / "data_batch_2"
    content = batch.read_bytes()
    images, labels = BATCHES["data_batch_2"]
    batch.write_bytes({
        "half": content[: len(content) // 2],
        "empty": b"",
        "code": pickle.dumps(print),
        "shape": copies.cifar_batch(images[:, :, :31], labels),
        "labels": copies.cifar_batch(images, [10] * len(labels)),
    }[damage])  # fmt: skip
    with pytest.raises(PreparationError, match=r"data_batch_2 .*--source FOLDER"):
        prepare(copy, tmp_path / "root", partial=True)
    assert not list((tmp_path / "root" / "cifar10").glob("*.npy"))


def test_half_an_archive(tmp_path: Path) -> None:
    archive = copies.cifar_archive(tmp_path / "copy", BATCHES) / cifar10.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(PreparationError, match=rf"cifar-10-python.tar.gz cannot be read.*{cifar10.ARCHIVE_MD5}"):
        prepare(archive, tmp_path / "root", partial=True)


def test_missing_batches_and_splits(tmp_path: Path) -> None:
    copy = copies.cifar_folder(tmp_path / "copy", BATCHES)
    (copy / "cifar-10-batches-py" / "data_batch_5").unlink()
    with pytest.raises(PreparationError, match="data_batch_5 missing"):
        prepare(copy, tmp_path / "root")
    assert prepare(copy, tmp_path / "root", partial=True).counts == {"train": 80, "test": 20}
    (copy / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(PreparationError, match="test_batch missing"):
        prepare(copy, tmp_path / "root2", partial=True)
    parquet = copies.cifar_parquet(tmp_path / "parquet", BATCHES)
    next(parquet.rglob("test-*")).unlink()
    with pytest.raises(PreparationError, match="no parquet file of the split test"):
        prepare(parquet, tmp_path / "root3", partial=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreparationError, match="neither CIFAR-10's batches nor parquet"):
        prepare(tmp_path / "empty", tmp_path / "root4")
    with pytest.raises(PreparationError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "root4")


@pytest.mark.parametrize("damage", ["half", "picture", "column"])
def test_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    copy = copies.cifar_parquet(tmp_path / "copy", BATCHES)
    (path,) = copy.rglob("train-*")
    if damage == "half":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "picture":
        rows = [{"bytes": b"no picture", "path": None}]
        copies.write_parquet(pyarrow.table({"img": rows, "label": [0]}), path)
    else:
        copies.write_parquet(pyarrow.table({"label": [0]}), path)
    with pytest.raises(PreparationError, match=rf"{path}, row .* cannot be read"):
        prepare(copy, tmp_path / "root", partial=True)


# ---- prepared data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "half", "missing", "manifest", "version", "other"])
def test_damage_after_the_preparation_is_detected(tmp_path: Path, damage: str) -> None:
    prepare(copies.cifar_folder(tmp_path / "copy", BATCHES), tmp_path / "root", partial=True)
    folder = tmp_path / "root" / "cifar10"
    path, manifest = folder / "train-images.npy", folder / "prepared.json"
    content = path.read_bytes()
    if damage == "bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        path.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "version":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    else:
        manifest.write_text(manifest.read_text().replace('"dataset": "cifar10"', '"dataset": "mnist"'))
    with pytest.raises(PreparationError, match=r"data=.*python scripts/prepare_data.py cifar10"):
        cifar10.load_splits(str(tmp_path / "root"))


def test_the_error_for_missing_data_says_how_to_prepare_them(
    make_spec: Callable[..., WorkloadSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prepared.ROOT_VARIABLE, str(tmp_path))
    workload = ResNet(load_run(["workload=resnet", "scale=full", "optimizer=sgd"]).spec)
    for source in ("auto", "hub", str(tmp_path)):
        with pytest.raises(WorkloadError, match=rf"data={source}: .*python scripts/prepare_data.py cifar10"):
            workload.load(source, CPU)


def test_batches_are_the_images_normalised_per_channel(tmp_path: Path) -> None:
    prepare(copies.cifar_folder(tmp_path / "copy", BATCHES), tmp_path / "root", partial=True)
    small = ["workload.data.validation_size=20", "workload.data.pad=0", "workload.data.flip=false"]
    workload = ResNet(load_run(["workload=resnet", "scale=full", "optimizer=sgd", *small]).spec)
    workload.load(str(tmp_path / "root"), CPU)
    assert workload.train_size == 80 and workload.fingerprint["published"].startswith("no: ")
    raw = np.concatenate([BATCHES[name][0] for name in copies.TRAIN]).astype(np.float64)
    mean, deviation = raw[:80].mean((0, 2, 3)), raw[:80].std((0, 2, 3))
    expected = (raw - mean[:, None, None]) / deviation[:, None, None]
    indices = torch.arange(79, -1, -1)
    batch = workload.batch(indices, torch.zeros(80, dtype=torch.int64))
    np.testing.assert_allclose(batch["inputs"], expected[:80][::-1], atol=1e-5)
    (held_back,) = workload.evaluation_batches("validation")
    np.testing.assert_allclose(held_back["inputs"], expected[80:], atol=1e-5)
    assert sum(len(b["labels"]) for b in workload.evaluation_batches("test")) == 20


def test_crops_and_mirrors_of_colour_images(tmp_path: Path, keys: torch.Tensor) -> None:
    prepare(copies.cifar_folder(tmp_path / "copy", BATCHES), tmp_path / "root", partial=True)

    def batch(pad: int, flip: str) -> torch.Tensor:
        small = ["workload.data.validation_size=20", f"workload.data.pad={pad}", f"workload.data.flip={flip}"]
        workload = ResNet(load_run(["workload=resnet", "scale=full", "optimizer=sgd", *small]).spec)
        workload.load(str(tmp_path / "root"), CPU)
        return workload.batch(torch.arange(64), keys)["inputs"]

    for augmented, image, key in zip(batch(4, "true"), batch(0, "false"), keys.tolist(), strict=True):
        row, column = (key & 0xFFFF) % 9, (key >> 16 & 0xFFFF) % 9
        crop = torch.nn.functional.pad(image, [4] * 4)[:, row : row + 32, column : column + 32]
        assert torch.equal(augmented, crop.flip(-1) if key >> 32 & 1 else crop)
