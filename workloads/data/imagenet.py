"""ImageNet-1k (Russakovsky et al. 2015, arXiv:1409.0575): 1,281,167 training and 50,000 validation pictures of 1000
classes.

Prepared from class folders (`train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`), or from the hub's parquet files or a
copy of them. The pictures' unchanged files are concatenated into a few large files, with an index. Every picture is
decoded once to check it. The index is sorted by the pictures' SHA-256, so the number of a picture does not depend on
the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import PreparationError
from workloads.data import decoding, prepared
from workloads.data.decoding import ByteRange
from workloads.data.prepared import INCOMPLETE_DOWNLOAD, RESUME, PreparedData, ReportProgress, Unit

NAME = "imagenet"
HUB = "ILSVRC/imagenet-1k"
COUNTS = {"train": 1_281_167, "validation": 50_000}
CLASSES = 1000
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
PICTURES_PER_UNIT = 20_000
"""Least number of pictures of a unit from class folders, which has complete classes. Each parquet file is a unit."""
INDEX_ENTRY = np.dtype(
    [("digest", "u1", (32,)), ("file", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("label", "<i2")]
)

REMEDY = (
    "ImageNet-1k can come from (1) the hub, after its terms have been accepted there: --source hub; (2) a folder with "
    "train/ and val/, each with a folder per class (n01440764, ...), or a copy of the hub's parquet files: --source "
    "FOLDER"
)


def prepare(source: str, root: Path, *, partial: bool, workers: int, report: ReportProgress) -> PreparedData:
    """Collect the pictures in `root/imagenet`. Raises PreparationError.

    source: hub, or a folder. partial: accept an incomplete data set. workers: processes.
    """
    units = _make_units(source)
    folder = root / NAME
    results = prepared.run_units(folder, units, pack_unit, workers, report)
    counts = {split: sum(r["count"] for r in results if r["split"] == split) for split in COUNTS}
    classes = len({label for result in results for label in result["labels"]})
    differences = [
        f"{counts[split]:,} of {expected:,} {split} pictures"
        for split, expected in COUNTS.items()
        if counts[split] != expected
    ]
    if classes != CLASSES:
        differences.append(f"{classes:,} of {CLASSES:,} classes")
    missing_data = "; ".join(differences)
    if missing_data and not partial:
        raise PreparationError(
            f"--source {source}: this is not the complete ImageNet-1k ({missing_data}); {REMEDY}; or add --partial to "
            "accept it for runs that no board counts"
        )
    files = {name: entry for result in results for name, entry in result["files"].items() if name.endswith(".bin")}
    try:
        for split in COUNTS:
            index = _merge_indices(folder, [result for result in results if result["split"] == split], list(files))
            name = f"{split}-index.npy"
            with prepared.hashed_writer(folder / name) as file:
                np.lib.format.write_array(file, index, allow_pickle=False)
            files[name] = prepared.manifest_entry(file, folder / name)
    except OSError as error:
        raise prepared.writing_error(error, folder) from error
    data = PreparedData(
        folder,
        NAME,
        source="hub" if source == "hub" else "folder",
        complete=not missing_data,
        missing_data=missing_data,
        content=prepared.content_hash(sum(int(result["digests"], 16) for result in results)),
        counts=counts,
        files=files,
        extra={"bins": [name for name in files if name.endswith(".bin")]},
    )
    prepared.finish_preparation(data)
    return data


def _make_units(source: str) -> list[Unit]:
    """The units of a source. Raises PreparationError if a split or a class is missing."""
    if source == "hub":
        return _parquet_units(prepared.download_hub_files(HUB, list(COUNTS)))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise PreparationError(f"--source {source}: no such folder; {REMEDY}")
    split_folders = {
        split: next((folder / n for n in names if (folder / n).is_dir()), None) for split, names in FOLDERS.items()
    }
    classes = {split: _class_folders(path) for split, path in split_folders.items() if path is not None}
    parquet = {split: prepared.list_parquet_files(folder, split) for split in COUNTS}
    # A copy of the hub may have folders `train` and `validation` with parquet files.
    if not any(classes.values()) and any(parquet.values()):
        classes = {}
    inputs: dict[str, Any] = classes or parquet
    if missing := [split for split in COUNTS if not inputs.get(split)]:
        raise PreparationError(f"--source {source}: no pictures of the split {' and '.join(missing)} in it; {REMEDY}")
    if not classes:
        return _parquet_units(parquet)
    names = [path.name for path in classes["train"]]
    if unknown := sorted({path.name for path in classes["validation"]} - set(names)):
        raise PreparationError(f"--source {source}: the validation split has classes that the training split lacks "
                               f"({', '.join(unknown[:3])}); {REMEDY}")  # fmt: skip
    # In the order of the names, which is that of the published labels.
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
            if len(pending) >= PICTURES_PER_UNIT or path == folders[-1]:
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


def pack_unit(folder: Path, unit: Unit) -> dict[str, Any]:
    """Write <unit>.bin with the pictures' bytes and <unit>.part.npy with their index entries; see `prepared.run_units`.

    The result has besides `files`: the `split`, the `count` of pictures, their `labels`, and the sum of the `digests`.
    Raises PreparationError, which names up to five pictures that cannot be decoded.
    """
    split, entries, digests, damaged = unit.options["split"], [], 0, []
    pictures_path, index_path = folder / f"{unit.name}.bin", folder / f"{unit.name}.part.npy"
    with prepared.hashed_writer(pictures_path) as pictures_file:
        for name, content, label in _read_pictures(unit):
            try:
                decoding.decode_picture(content)
            # Pillow raises many types.
            except Exception as error:
                damaged.append(f"{name} ({error})")
                continue
            digest = hashlib.sha256(f"{split} {label} ".encode() + content).digest()
            entries.append((np.frombuffer(digest, np.uint8), 0, pictures_file.bytes, len(content), label))
            pictures_file.write(content)
            digests += int.from_bytes(digest, "big")
        # Only now, so that one run names all of them.
        if damaged:
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise PreparationError(
                f"--source: {len(damaged)} pictures cannot be decoded: {', '.join(damaged[:5])}{more}; get them again, "
                f"and {RESUME}"
            )
    index = np.array(entries, INDEX_ENTRY)
    with prepared.hashed_writer(index_path) as index_file:
        np.lib.format.write_array(index_file, index, allow_pickle=False)
    files = {
        pictures_path.name: prepared.manifest_entry(pictures_file, pictures_path),
        index_path.name: prepared.manifest_entry(index_file, index_path),
    }
    labels = sorted(set(index["label"].tolist()))
    return {"files": files, "split": split, "count": len(index), "labels": labels,
            "digests": prepared.content_hash(digests)}  # fmt: skip


def _read_pictures(unit: Unit) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes and label of every picture of a unit. Raises PreparationError, which names the file and the row."""
    if unit.options["kind"] == "files":
        for name, label in zip(unit.inputs, unit.options["labels"], strict=True):
            yield name, Path(name).read_bytes(), label
        return
    import pyarrow.parquet

    (path,) = unit.inputs
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := {"image", "label"} - set(file.schema_arrow.names):
                raise ValueError(f"it has no column {' and '.join(sorted(missing))}")
            for batch in file.iter_batches(256, columns=["image", "label"]):
                for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                    if not 0 <= label < CLASSES:
                        raise ValueError(f"label {label} is not in 0..{CLASSES - 1}")
                    yield f"{path}, row {row}, {image['path']}", image["bytes"], label
                    row += 1
    # pyarrow's errors for damaged files are among these types.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreparationError(
            f"--source: {path}, row {row} cannot be read ({type(error).__name__}: {error}), {INCOMPLETE_DOWNLOAD}; "
            f"download it again, and {RESUME}"
        ) from error


def _merge_indices(folder: Path, results: list[dict[str, Any]], bins: list[str]) -> np.ndarray:
    """The index of a split, sorted by digest; a duplicate picture has two entries.

    results: those of the split's units. bins: names of all files with pictures, in the order of their numbers.
    """
    parts = []
    for result in results:
        pictures_name, index_name = sorted(result["files"])
        entries = np.load(folder / index_name, allow_pickle=False)
        entries["file"] = bins.index(pictures_name)
        parts.append(entries)
    index = np.concatenate(parts)
    # The last key is the first to sort by; the others only order duplicates.
    order = np.lexsort((index["offset"], index["file"], index["digest"].view("S32")[:, 0]))
    return index[order]


class Pictures:
    """A split of the prepared data: the location and the label of each picture. labels: int64 [n]."""

    def __init__(self, data: PreparedData, split: str) -> None:
        self._index = np.load(data.folder / f"{split}-index.npy", mmap_mode="r", allow_pickle=False)
        self._paths = [str(data.folder / name) for name in data.extra["bins"]]
        self.labels = np.asarray(self._index["label"], np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def locate(self, numbers: np.ndarray) -> list[ByteRange]:
        """The locations of the pictures with these numbers (integers [n])."""
        entries = self._index[numbers]
        columns = (entries[name].tolist() for name in ("file", "offset", "length"))
        return [ByteRange(self._paths[file], offset, length) for file, offset, length in zip(*columns, strict=True)]


def load_splits(source: str) -> tuple[PreparedData, dict[str, Pictures]]:
    """The prepared splits `train` and `validation`. Raises PreparationError if they are missing or damaged.

    source: auto, a root, or the folder of the prepared data.
    """
    data = prepared.open_prepared(NAME, source)
    return data, {split: Pictures(data, split) for split in COUNTS}
