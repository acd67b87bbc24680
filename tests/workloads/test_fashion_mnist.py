from __future__ import annotations

import gzip
import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from harness.errors import WorkloadError
from workloads.data import fashion_mnist
from workloads.data.fashion_mnist import DEBIAN, Images, parse_idx

from .conftest import Splits, idx_bytes

REMEDY = r"data=hub.*apt-get install dataset-fashion-mnist.*data=debian.*data=/path/to/folder"


def assert_same(splits: Splits, expected: Splits) -> None:
    for name in ("train", "test"):
        np.testing.assert_array_equal(splits[name].images, expected[name].images)
        np.testing.assert_array_equal(splits[name].labels, expected[name].labels)


# -- IDX --------------------------------------------------------------------------------------------------------------


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    np.testing.assert_array_equal(parse_idx(idx_bytes(array)), array)


@given(arrays(np.uint8, array_shapes(max_dims=3, max_side=4)), st.data())
def test_idx_of_another_length_is_refused(array: np.ndarray, data: st.DataObject) -> None:
    content = idx_bytes(array)
    for wrong in (content[: data.draw(st.integers(0, len(content) - 1))], content + b"x"):
        with pytest.raises(ValueError, match="IDX"):
            parse_idx(wrong)


@given(st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(b"\x00\x00\x08".__add__)))
def test_any_bytes_are_an_idx_file_or_a_value_error(content: bytes) -> None:
    try:
        array = parse_idx(content)
    except ValueError:
        return
    assert idx_bytes(array) == content


# -- The three sources ------------------------------------------------------------------------------------------------


def test_folder_of_idx_files(idx_folder: Path, noise: Splits) -> None:
    source, splits = fashion_mnist.load_splits(str(idx_folder))
    assert source == str(idx_folder)
    assert_same(splits, noise)


def test_auto_prefers_debian_to_the_hub(idx_folder: Path, noise: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", idx_folder)
    assert fashion_mnist.load_splits("auto")[0] == fashion_mnist.load_splits("debian")[0] == "debian"
    monkeypatch.setattr(fashion_mnist, "DEBIAN", idx_folder / "absent")
    monkeypatch.setattr(fashion_mnist, "_load_with_datasets", lambda split: noise[split])
    assert fashion_mnist.load_splits("auto")[0] == "hub"


def test_hub(noise: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        assert name == "zalando-datasets/fashion_mnist"
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        columns = {"image": list(noise[split].images), "label": noise[split].labels.tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, splits = fashion_mnist.load_splits("hub")
    assert source == "hub"
    assert_same(splits, noise)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(WorkloadError, match=rf"^data=hub: .*ConnectionError: no route\)\..*{REMEDY}") as caught:
        fashion_mnist.load_splits("hub")
    assert "\n" not in str(caught.value)


@pytest.fixture
def parquet_folder(noise: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the hub's files: PNG in a struct, in a subfolder, without metadata."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "copy" / "fashion_mnist"
    folder.mkdir(parents=True)
    for name, split in noise.items():
        images = [{"bytes": png(image), "path": None} for image in split.images]
        table = pyarrow.table({"image": images, "label": split.labels.astype(np.int64)})
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return tmp_path / "copy"


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    PIL.Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def test_folder_in_the_hubs_format(parquet_folder: Path, noise: Splits) -> None:
    assert_same(fashion_mnist.load_splits(str(parquet_folder))[1], noise)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no image column"])
def test_damaged_parquet(parquet_folder: Path, damage: str) -> None:
    (file,) = parquet_folder.rglob("test*.parquet")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        file.unlink()
    else:
        pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), file)
    with pytest.raises(WorkloadError, match=rf"^data=.*cannot be read.*{REMEDY}"):
        fashion_mnist.load_splits(str(parquet_folder))


# -- Damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "no IDX", "empty", "missing", "other type", "flipped bit"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"])
def test_damaged_idx_files(idx_folder: Path, name: str, damage: str) -> None:
    path = idx_folder / name
    stored = path.read_bytes()
    content = gzip.decompress(stored) if path.suffix == ".gz" else stored
    zipped = (lambda raw: gzip.compress(raw, 1)) if path.suffix == ".gz" else bytes
    damaged = {
        "truncated": stored[: len(stored) // 2],
        "no IDX": b"<html>404</html>",
        "empty": b"",
        "other type": zipped(b"\x00\x00\x0d" + content[3:]),
        "flipped bit": zipped(content[:-1] + bytes([content[-1] ^ 1])),
    }
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    reason = "is not Fashion-MNIST as released" if damage == "flipped bit" else "cannot be read"
    with pytest.raises(WorkloadError, match=rf"^data={idx_folder}: .*{reason}.*{REMEDY}"):
        fashion_mnist.load_splits(str(idx_folder))


def test_the_hash_depends_on_the_labels() -> None:
    images, labels = np.zeros((2, 28, 28), np.uint8), np.array([0, 1], np.uint8)
    assert Images(images, labels).sha256 != Images(images, labels[::-1]).sha256


@pytest.mark.parametrize("source", ["/nowhere", "~/nowhere", "debain"])
def test_missing_folder(source: str) -> None:
    with pytest.raises(WorkloadError, match=rf"^data={source}: .*(nowhere|debain) is not a folder.*{REMEDY}"):
        fashion_mnist.load_splits(source)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_real_files() -> None:
    splits = fashion_mnist.load_splits("debian")[1]
    assert splits["train"].images.shape == (60_000, 28, 28)
    assert splits["test"].images.shape == (10_000, 28, 28)
    assert np.bincount(splits["train"].labels).tolist() == [6_000] * 10
