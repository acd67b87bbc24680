"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32 x 32, ten classes.

Prepared from the release's Python batches (a folder, or cifar-10-python.tar.gz as it is), or from the hub's parquet
files, to uint8 arrays that are read by memory mapping. The release's files are checked by the MD5 sums that torchvision
pins; for the hub's, of which no sum is published, the images are counted per class.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from harness.errors import PreparationError
from workloads.data import prepared
from workloads.data.prepared import Prepared, Report, Unit

NAME = "cifar10"
HUB = "uoft-cs/cifar10"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
BATCHES = {
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
"""MD5 of the files of the release."""
COUNTS = {"train": 50_000, "test": 10_000}
PIXELS = (3, 32, 32)

REMEDY = (
    f"CIFAR-10 can come from (1) the hub: --source hub; (2) {ARCHIVE} or the folder it unpacks to, or a copy of the "
    "hub's parquet files: --source FOLDER"
)


class Images(NamedTuple):
    images: np.ndarray
    """uint8 [n, 3, 32, 32]"""
    labels: np.ndarray
    """uint8 [n]"""


def load(source: str) -> tuple[Prepared, dict[str, Images]]:
    """The prepared splits `train` and `test`, memory-mapped. PreparationError if they are missing or damaged."""
    found = prepared.find(NAME, source)
    splits = {
        split: Images(*(np.load(found.folder / name, mmap_mode="r", allow_pickle=False) for name in _names(split)))
        for split in COUNTS
    }
    return found, splits


def prepare(source: str, root: Path, *, partial: bool, workers: int, report: Report) -> Prepared:
    """Decode once into `root/cifar10`. source: hub, or a folder. partial: take what is not the whole release, too."""
    if source == "hub":
        files = prepared.hub_files(HUB, list(COUNTS))
        units = [
            Unit("all", tuple(str(f) for part in files.values() for f in part), _options(files, "parquet", partial))
        ]
    else:
        units = [_unit_of(Path(source).expanduser(), partial)]
    folder = root / NAME
    (receipt,) = prepared.run_units(folder, units, decode, 1, report)
    missing_data = "; ".join(
        f"{receipt['counts'][split]:,} of {count:,} {split} images"
        for split, count in COUNTS.items()
        if receipt["counts"][split] != count or not receipt["balanced"][split]
    )
    if receipt["other"]:
        missing_data = "; ".join([missing_data, f"other MD5 than released: {', '.join(receipt['other'])}"]).lstrip("; ")
    kind = "hub" if source == "hub" else "folder"
    whole = Prepared(
        folder, NAME, kind, not missing_data, missing_data, receipt["content"], receipt["counts"], receipt["files"]
    )
    if missing_data and not partial:
        raise PreparationError(f"--source {source}: this is not the whole of CIFAR-10 ({missing_data}); {REMEDY}; "
                               "or add --partial to take it all the same, for runs that no board counts")  # fmt: skip
    prepared.finish(whole)
    return whole


def _unit_of(source: Path, partial: bool) -> Unit:
    if not source.exists():
        raise PreparationError(f"--source {source}: no such file or folder; {REMEDY}")
    archive = source if source.is_file() else source / ARCHIVE
    if archive.is_file():
        return Unit("all", (str(archive),), {"kind": "archive", "partial": partial})
    for folder in (source, source / "cifar-10-batches-py"):
        paths = {split: [folder / name for name in names] for split, names in BATCHES.items()}
        there = [path for part in paths.values() for path in part if path.exists()]
        if there:
            lacking = sorted(path.name for part in paths.values() for path in part if not path.exists())
            if lacking and not (partial and all(any(p.exists() for p in part) for part in paths.values())):
                raise PreparationError(f"--source {source}: {', '.join(lacking)} missing from {folder}; {REMEDY}")
            kept = {split: [path for path in part if path.exists()] for split, part in paths.items()}
            return Unit("all", tuple(map(str, there)), _options(kept, "batches", partial))
    parquet = {split: prepared.parquet_files(source, split) for split in COUNTS}
    if lacking := [split for split, files in parquet.items() if not files]:
        what = "neither CIFAR-10's batches nor parquet files" if len(lacking) == len(COUNTS) else "no parquet file"
        raise PreparationError(f"--source {source}: {what} of the split {' and '.join(lacking)}; {REMEDY}")
    return Unit("all", tuple(str(f) for part in parquet.values() for f in part), _options(parquet, "parquet", partial))


def _options(files: dict[str, list[Path]], kind: str, partial: bool) -> dict[str, Any]:
    return {"kind": kind, "partial": partial, "files": {split: [str(f) for f in part] for split, part in files.items()}}


def decode(folder: Path, unit: Unit) -> dict[str, Any]:
    """The unit of CIFAR-10: both splits."""
    options = unit.options
    other: list[str] = []
    if options["kind"] == "archive":
        splits, other = _from_batches(_members(Path(unit.inputs[0])), options["partial"])
    elif options["kind"] == "batches":
        paths = [Path(path) for part in options["files"].values() for path in part]
        splits, other = _from_batches(((path.name, path.read_bytes()) for path in paths), options["partial"])
    else:
        splits = {split: _from_parquet([Path(f) for f in files]) for split, files in options["files"].items()}
    result: dict[str, Any] = {"files": {}, "counts": {}, "balanced": {}, "other": other}
    digests = 0
    for split, images in splits.items():
        for name, array in zip(_names(split), images, strict=True):
            with prepared.writing(folder / name) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            result["files"][name] = prepared.entry(file, folder / name)
        result["counts"][split] = len(images.labels)
        result["balanced"][split] = len(set(np.bincount(images.labels, minlength=10).tolist())) == 1
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            one = hashlib.sha256(f"{split} {label} ".encode() + image.tobytes())
            digests += int.from_bytes(one.digest(), "big")
    result["content"] = prepared.content_hash(digests)
    return result


def _names(split: str) -> tuple[str, str]:
    return f"{split}-images.npy", f"{split}-labels.npy"


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the batches in the release's archive."""
    wanted = {name for names in BATCHES.values() for name in names}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    file = opened.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise PreparationError(f"--source: {archive} cannot be read ({type(error).__name__}: {error}), half a download "
                               f"perhaps; its MD5 should be {ARCHIVE_MD5}; {REMEDY}") from error  # fmt: skip


def _from_batches(batches: Iterator[tuple[str, bytes]], partial: bool) -> tuple[dict[str, Images], list[str]]:
    """The splits, and which batches are not the released ones."""
    found, other = {}, []
    sums = {name: md5 for names in BATCHES.values() for name, md5 in names.items()}
    for name, content in batches:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != sums[name]:
            if not partial:
                raise PreparationError(
                    f"--source: {name} has the MD5 {md5}, the released one {sums[name]}; get it again, {REMEDY}; or "
                    "add --partial to take it all the same, for runs that no board counts"
                )
            other.append(name)
        found[name] = _unpickled(name, content)
    splits = {}
    for split, names in BATCHES.items():
        parts = [found[name] for name in names if name in found]
        if not parts or (len(parts) < len(names) and not partial):
            lacking = ", ".join(name for name in names if name not in found)
            raise PreparationError(f"--source: {lacking} missing; {REMEDY}")
        splits[split] = Images(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    return splits, other


class _ArraysOnly(pickle.Unpickler):
    """A batch is a dict of an array and lists; anything else that a pickle could call is refused."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(name: str, content: bytes) -> Images:
    try:
        values = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        return _checked(np.asarray(values[b"data"]).reshape(-1, *PIXELS), values[b"labels"], name)
    except PreparationError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise PreparationError(f"--source: {name} is no batch of CIFAR-10 ({type(error).__name__}: {error}), half a "
                               f"download perhaps; {REMEDY}") from error  # fmt: skip


def _from_parquet(files: Sequence[Path]) -> Images:
    import pyarrow.parquet
    from PIL import Image

    images, labels = [], []
    for path in files:
        row = 0
        try:
            table = pyarrow.parquet.read_table(path)
            column = "img" if "img" in table.column_names else "image"
            for value in table[column].to_pylist():
                row += 1
                with Image.open(io.BytesIO(value["bytes"])) as image:
                    images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
            labels += table["label"].to_pylist()
        except Exception as error:  # pyarrow and Pillow raise many kinds; all mean that this file does not serve
            raise PreparationError(f"--source: {path}, row {row} cannot be read ({type(error).__name__}: {error}); "
                                   f"get the file again; {REMEDY}") from error  # fmt: skip
    return _checked(np.stack(images) if images else np.empty((0, *PIXELS), np.uint8), labels, files[0].name)


def _checked(images: np.ndarray, labels: Sequence[int], name: str) -> Images:
    classes = np.asarray(labels)
    fits = images.dtype == np.uint8 and images.shape[1:] == PIXELS and classes.shape == (len(images),) and len(images)
    if not fits or classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() > 9:
        raise PreparationError(
            f"--source: {name} does not hold images of 3 x 32 x 32 bytes with labels from 0 to 9; {REMEDY}"
        )
    return Images(np.ascontiguousarray(images), classes.astype(np.uint8))
