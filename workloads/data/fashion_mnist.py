"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; MIT): 70,000 grey images of 28 x 28, ten classes.

There are three sources with the same content: the Hugging Face hub through `datasets`, the Debian package
dataset-fashion-mnist, or a folder with the IDX files (plain or .gz) or the hub's parquet files. The same hash of pixels
and labels is checked for all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.interface import WorkloadError

HUB = "zalando-datasets/fashion_mnist"
SOURCES = ("hub", "debian")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}
"""Hashes of the images' bytes followed by the labels' bytes, computed from the files of the original release."""

REMEDY = (
    "Fashion-MNIST can come from (1) the Hugging Face hub, with a network: data=hub; "
    "(2) Debian's package, `apt-get install dataset-fashion-mnist`: data=debian; "
    "(3) a folder with its four IDX files or the hub's parquet files: data=/path/to/folder"
)


class Images(NamedTuple):
    """The images and labels of a split."""

    images: np.ndarray
    """uint8 [n, 28, 28]"""
    labels: np.ndarray
    """uint8 [n]"""

    @property
    def sha256(self) -> str:
        """The hash that is compared with `SHA256`."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load_splits(source: str) -> tuple[str, dict[str, Images]]:
    """The source that was used and the splits `train` (60,000 images) and `test` (10,000).

    source: auto, hub, debian, or a folder. Raises WorkloadError if the data are missing, damaged or other than the
    released ones.
    """
    if source == "auto":
        source = "debian" if DEBIAN.is_dir() else "hub"
    try:
        if source == "hub":
            splits = {split: _load_with_datasets(split) for split in SHA256}
        elif source == "debian":
            splits = _load_folder(DEBIAN)
        else:
            splits = _load_folder(Path(source).expanduser())
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        reason = _first_line(error)
        raise WorkloadError(f"data={source}: Fashion-MNIST cannot be read ({reason}). {REMEDY}") from error
    for split, expected in SHA256.items():
        if (actual := splits[split].sha256) != expected:
            raise WorkloadError(
                f"data={source}: the {split} split is not Fashion-MNIST as released "
                f"(SHA-256 {actual}, expected {expected}). {REMEDY}"
            )
    return source, splits


def parse_idx(content: bytes) -> np.ndarray:
    """The array of an IDX file of unsigned bytes. Raises ValueError if it is none.

    The format: the bytes 0, 0, 8 and the number of dimensions; their sizes, big-endian uint32; the data.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError("truncated IDX header")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    size = 1
    for length in shape:
        size *= length
    if len(content) != header + size:
        raise ValueError(f"IDX data of {len(content) - header} bytes where the header says {size}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _load_folder(folder: Path) -> dict[str, Images]:
    """The splits from IDX or parquet files. Raises OSError or ValueError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if any(folder.rglob("*.parquet")):
        return {split: _load_with_datasets(split, folder) for split in SHA256}
    names = {"train": "train", "test": "t10k"}
    return {
        split: Images(
            parse_idx(_read_file(folder, f"{name}-images-idx3-ubyte")),
            parse_idx(_read_file(folder, f"{name}-labels-idx1-ubyte")),
        )
        for split, name in names.items()
    }


def _read_file(folder: Path, name: str) -> bytes:
    """The content of a file that may be compressed."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        return plain.read_bytes()
    if zipped.exists():
        return gzip.decompress(zipped.read_bytes())
    raise FileNotFoundError(f"neither {plain.name} nor {zipped.name} in {folder}")


def _load_with_datasets(split: str, folder: Path | None = None) -> Images:
    """A split through `datasets`, from the hub or from a local copy of its parquet files. Raises OSError."""
    import datasets

    try:
        if folder is None:
            rows: Any = datasets.load_dataset(HUB, split=split)
        else:
            files = sorted(str(path) for path in folder.rglob(f"{split}*.parquet"))
            if not files:
                raise FileNotFoundError(f"no {split}*.parquet in {folder}")
            rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
            rows = rows.cast_column("image", datasets.Image())
        rows = rows.with_format("numpy")
        return Images(
            np.stack([np.asarray(image, dtype=np.uint8) for image in rows["image"]]),
            np.asarray(rows["label"], dtype=np.uint8),
        )
    # datasets and pyarrow raise many types; all mean that this source cannot be used.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
