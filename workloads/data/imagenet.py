"""ImageNet-1k (Russakovsky et al. 2015, arXiv:1409.0575): 1,281,167 training and 50,000 validation pictures of 1000
classes.

Prepared from class folders (`train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`), or from the hub's parquet files or a
copy of them: the pictures' files as they are, put together into a few large files, with an index. Every picture is
decoded once to see that it can be. The index is in the order of the pictures' SHA-256, so a picture has one number
whichever way it came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import PreparationError
from workloads.data import decoding, prepared
from workloads.data.decoding import Blob
from workloads.data.prepared import Prepared, Report, Unit

NAME = "imagenet"
HUB = "ILSVRC/imagenet-1k"
COUNTS = {"train": 1_281_167, "validation": 50_000}
CLASSES = 1000
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
UNIT = 20_000
"""Pictures per unit from class folders, or the first class that gets there; a parquet file is a unit by itself."""
ENTRY = np.dtype([("digest", "u1", (32,)), ("file", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("label", "<i2")])

REMEDY = (
    "ImageNet-1k can come from (1) the hub, after its terms have been accepted there: --source hub; (2) a folder with "
    "train/ and val/, each with a folder per class (n01440764, ...), or a copy of the hub's parquet files: --source "
    "FOLDER"
)


def prepare(source: str, root: Path, *, partial: bool, workers: int, report: Report) -> Prepared:
    """Put together in `root/imagenet`. source: hub, or a folder. partial: take what is not the whole data set, too."""
    units = _units(source)
    folder = root / NAME
    receipts = prepared.run_units(folder, units, pack, workers, report)
    counts = {split: sum(r["count"] for r in receipts if r["split"] == split) for split in COUNTS}
    classes = len({label for receipt in receipts for label in receipt["labels"]})
    short = [
        f"{counts[split]:,} of {wanted:,} {split} pictures"
        for split, wanted in COUNTS.items()
        if counts[split] != wanted
    ]
    if classes != CLASSES:
        short.append(f"{classes:,} of {CLASSES:,} classes")
    missing_data = "; ".join(short)
    if missing_data and not partial:
        raise PreparationError(f"--source {source}: this is not the whole of ImageNet-1k ({missing_data}); {REMEDY}; "
                               "or add --partial to take it all the same, for runs that no board counts")  # fmt: skip
    files = {name: entry for receipt in receipts for name, entry in receipt["files"].items() if name.endswith(".bin")}
    try:
        for split in COUNTS:
            index = _index(folder, [receipt for receipt in receipts if receipt["split"] == split], list(files))
            name = f"{split}-index.npy"
            with prepared.writing(folder / name) as file:
                np.lib.format.write_array(file, index, allow_pickle=False)
            files[name] = prepared.entry(file, folder / name)
    except OSError as error:
        raise prepared.out_of_room(error, folder) from error
    content = prepared.content_hash(sum(int(receipt["digests"], 16) for receipt in receipts))
    extra = {"bins": [name for name in files if name.endswith(".bin")]}
    whole = Prepared(
        folder,
        NAME,
        "hub" if source == "hub" else "folder",
        not missing_data,
        missing_data,
        content,
        counts,
        files,
        extra,
    )
    prepared.finish(whole)
    return whole


def _units(source: str) -> list[Unit]:
    if source == "hub":
        return _parquet_units(prepared.hub_files(HUB, list(COUNTS)))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise PreparationError(f"--source {source}: no such folder; {REMEDY}")
    found = {
        split: next((folder / n for n in names if (folder / n).is_dir()), None) for split, names in FOLDERS.items()
    }
    classes = {split: _class_folders(path) for split, path in found.items() if path is not None}
    parquet = {split: prepared.parquet_files(folder, split) for split in COUNTS}
    if not any(classes.values()) and any(parquet.values()):
        classes = {}
    kinds: dict[str, Any] = classes or parquet
    if lacking := [split for split in COUNTS if not kinds.get(split)]:
        raise PreparationError(f"--source {source}: no pictures of the split {' and '.join(lacking)} there; {REMEDY}")
    if not classes:
        return _parquet_units(parquet)
    names = [path.name for path in classes["train"]]
    if strange := sorted({path.name for path in classes["validation"]} - set(names)):
        raise PreparationError(f"--source {source}: the validation split has classes that the training split lacks "
                               f"({', '.join(strange[:3])}); {REMEDY}")  # fmt: skip
    labels = {name: label for label, name in enumerate(names)}
    units: list[Unit] = []
    for split, folders in classes.items():
        pending: list[tuple[str, int]] = []
        for path in folders:
            pending += [
                (str(file), labels[path.name])
                for file in sorted(path.iterdir())
                if file.is_file() and file.name[0] != "."
            ]
            if len(pending) >= UNIT or path == folders[-1]:
                options = {"split": split, "kind": "files", "labels": [label for _, label in pending]}
                units.append(Unit(f"{split}-{len(units):05d}", tuple(file for file, _ in pending), options))
                pending = []
    return units


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _parquet_units(files: dict[str, list[Path]]) -> list[Unit]:
    return [
        Unit(f"{split}-{i:05d}", (str(path),), {"split": split, "kind": "parquet"})
        for split, paths in files.items()
        for i, path in enumerate(paths)
    ]


def pack(folder: Path, unit: Unit) -> dict[str, Any]:
    """A unit's pictures: <unit>.bin with their bytes, <unit>.part.npy with where each lies."""
    split, entries, digests, bad = unit.options["split"], [], 0, []
    blob, part = folder / f"{unit.name}.bin", folder / f"{unit.name}.part.npy"
    with prepared.writing(blob) as file:
        for name, content, label in _pictures(unit):
            try:
                decoding.decode(content)
            except Exception as error:  # Pillow raises many kinds
                bad.append(f"{name} ({error})")
                continue
            digest = hashlib.sha256(f"{split} {label} ".encode() + content).digest()
            entries.append((np.frombuffer(digest, np.uint8), 0, file.bytes, len(content), label))
            file.write(content)
            digests += int.from_bytes(digest, "big")
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise PreparationError(f"--source: {len(bad)} pictures do not decode: {', '.join(bad[:5])}{more}; get them "
                                   "again, and the same command goes on where it stopped")  # fmt: skip
    index = np.array(entries, ENTRY)
    with prepared.writing(part) as file_:
        np.lib.format.write_array(file_, index, allow_pickle=False)
    written = {blob.name: prepared.entry(file, blob), part.name: prepared.entry(file_, part)}
    labels = sorted(set(index["label"].tolist()))
    return {"files": written, "split": split, "count": len(index), "labels": labels,
            "digests": prepared.content_hash(digests)}  # fmt: skip


def _pictures(unit: Unit) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes and label of every picture of a unit."""
    if unit.options["kind"] == "files":
        for name, label in zip(unit.inputs, unit.options["labels"], strict=True):
            yield name, Path(name).read_bytes(), label
        return
    import pyarrow.parquet

    (path,) = unit.inputs
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if lacking := {"image", "label"} - set(file.schema_arrow.names):
                raise ValueError(f"it has no column {' and '.join(sorted(lacking))}")
            for batch in file.iter_batches(256, columns=["image", "label"]):
                for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    if not 0 <= label < CLASSES:
                        raise ValueError(f"label {label} is not in 0..{CLASSES - 1}")
                    yield f"{path}, row {row}, {image['path']}", image["bytes"], label
                    row += 1
    except (OSError, ValueError, KeyError, TypeError) as error:  # what pyarrow raises for damaged files among them
        raise PreparationError(
            f"--source: {path}, row {row} cannot be read ({type(error).__name__}: {error}), half a download perhaps; "
            "get it again, and the same command goes on where it stopped"
        ) from error


def _index(folder: Path, receipts: list[dict[str, Any]], bins: list[str]) -> np.ndarray:
    """The entries of a split by digest; a picture that is there twice keeps both."""
    parts = []
    for receipt in receipts:
        blob, part = sorted(receipt["files"])
        entries = np.load(folder / part, allow_pickle=False)
        entries["file"] = bins.index(blob)
        parts.append(entries)
    index = np.concatenate(parts)
    order = np.lexsort((index["offset"], index["file"], index["digest"].view("S32")[:, 0]))
    return index[order]


class Pictures:
    """A split of the prepared data: where each picture lies, and its label."""

    def __init__(self, found: Prepared, split: str) -> None:
        self._index = np.load(found.folder / f"{split}-index.npy", mmap_mode="r", allow_pickle=False)
        self._paths = [str(found.folder / name) for name in found.extra["bins"]]
        self.labels = np.asarray(self._index["label"], np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def blobs(self, positions: np.ndarray) -> list[Blob]:
        entries = self._index[positions]
        columns = (entries[name].tolist() for name in ("file", "offset", "length"))
        return [Blob(self._paths[file], offset, length) for file, offset, length in zip(*columns, strict=True)]


def load(source: str) -> tuple[Prepared, dict[str, Pictures]]:
    """The prepared splits `train` and `validation`. PreparationError if missing or damaged."""
    found = prepared.find(NAME, source)
    return found, {split: Pictures(found, split) for split in COUNTS}
