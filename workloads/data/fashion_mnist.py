"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, ten classes (Xiao et al. 2017, arXiv:1708.07747).

Three ways to get it, one content: the decoded pixels and labels are hashed, not the files they came in, so a record
means the same whichever way was taken.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.workload import WorkloadError

HUB_NAME = "zalando-datasets/fashion_mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NUM_CLASSES = 10
MEAN, STD = 0.2860, 0.3530
"""Of the training pixels, scaled to [0, 1]."""

SHA256 = {
    "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
"""Of the raw bytes of each array, in the order of the official files."""

WAYS = (
    "Fashion-MNIST can come from three places: data=hub (downloaded by the `datasets` package), "
    "data=debian (after `apt-get install dataset-fashion-mnist`), or data=/path/to/folder "
    "(the four *-ubyte or *-ubyte.gz files, or a copy of the hub's train*.parquet and test*.parquet)."
)


class FashionMNIST(NamedTuple):
    """uint8 arrays: images [60000, 28, 28] and [10000, 28, 28], labels [60000] and [10000]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def hashes(self) -> dict[str, str]:
        return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self._asdict().items()}


def load(source: str) -> tuple[FashionMNIST, str]:
    """The checked arrays, and the name of the way they came: hub, debian or folder."""
    if source == "auto":
        source = "debian" if DEBIAN_FOLDER.is_dir() else "hub"
    if source == "hub":
        arrays, way = _from_hub(), "hub"
    elif source == "debian":
        arrays, way = _from_folder(DEBIAN_FOLDER, source), "debian"
    else:
        arrays, way = _from_folder(Path(source).expanduser(), source), "folder"
    wrong = [name for name, digest in arrays.hashes().items() if digest != SHA256[name]]
    if wrong:
        raise WorkloadError(
            f"data={source}: {', '.join(wrong)} differ from the official Fashion-MNIST "
            f"(SHA-256 of {wrong[0]} is {arrays.hashes()[wrong[0]]}, expected {SHA256[wrong[0]]}). {WAYS}"
        )
    return arrays, way


def parse_idx(raw: bytes) -> np.ndarray:
    """A uint8 array from the bytes of an IDX file: two zeros, type 8, rank, big-endian sizes, data."""
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    rank = raw[3]
    start = 4 + 4 * rank
    if len(raw) < start:
        raise ValueError("the IDX header is cut off")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{len(raw) - start} bytes of data, but the header says {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _from_folder(folder: Path, source: str) -> FashionMNIST:
    if not folder.is_dir():
        raise WorkloadError(f"data={source}: there is no folder {folder}. {WAYS}")
    if any(folder.rglob("train*.parquet")):
        return _from_parquet(folder, source)
    return FashionMNIST(
        *(_read_idx(folder, f"{part}-{kind}-ubyte", source)
          for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
    )  # fmt: skip


def _read_idx(folder: Path, name: str, source: str) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise WorkloadError(f"data={source}: neither {name} nor {name}.gz is in {folder}. {WAYS}")
    try:
        raw = path.read_bytes()
        return parse_idx(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"data={source}: cannot read {path}: {error}. {WAYS}") from error


def _from_hub() -> FashionMNIST:
    try:
        from datasets import load_dataset

        return _decode(load_dataset(HUB_NAME))
    except Exception as error:  # The hub fails in dozens of ways, all of which mean the same to the user.
        raise WorkloadError(f"data=hub: cannot load {HUB_NAME}: {_first_line(error)}. {WAYS}") from error


def _from_parquet(folder: Path, source: str) -> FashionMNIST:
    files = {split: sorted(map(str, folder.rglob(f"{split}*.parquet"))) for split in ("train", "test")}
    if not files["test"]:
        raise WorkloadError(f"data={source}: {folder} holds train*.parquet but no test*.parquet. {WAYS}")
    try:
        from datasets import load_dataset

        # Streaming reads the files where they lie; without it they would be copied into the user's cache.
        return _decode(load_dataset("parquet", data_files=files, streaming=True))
    except Exception as error:  # As above: bad parquet, bad PNG, missing column, ...
        raise WorkloadError(f"data={source}: cannot read {folder}: {_first_line(error)}. {WAYS}") from error


def _decode(splits: Any) -> FashionMNIST:
    """From the hub's columns `image` (PNG) and `label`."""
    from datasets import Image

    def arrays(rows: Iterable[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(np.asarray(row["image"], np.uint8), row["label"]) for row in rows]
        return np.stack([image for image, _ in pairs]), np.asarray([label for _, label in pairs], np.uint8)

    train, test = (arrays(splits[name].cast_column("image", Image())) for name in ("train", "test"))
    return FashionMNIST(*train, *test)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
