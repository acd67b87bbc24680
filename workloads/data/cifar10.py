"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32 x 32, ten classes.

Prepared from the release's Python batches (a folder, or cifar-10-python.tar.gz itself) or from the hub's parquet files,
to uint8 arrays that are read by memory mapping. The release's files are checked by the MD5 sums that torchvision pins.
No sums are published for the hub's files, so their images are counted per class.
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
from workloads.data.prepared import INCOMPLETE_DOWNLOAD, PreparedData, ReportProgress, Unit

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
ACCEPT_PARTIAL = "add --partial to accept it for runs that no board counts"


class Images(NamedTuple):
    """The images and labels of a split."""

    images: np.ndarray
    """uint8 [n, 3, 32, 32]"""
    labels: np.ndarray
    """uint8 [n]"""


def load_splits(source: str) -> tuple[PreparedData, dict[str, Images]]:
    """The prepared splits `train` and `test`, memory-mapped. Raises PreparationError if they are missing or damaged.

    source: auto, a root, or the folder of the prepared data.
    """
    data = prepared.open_prepared(NAME, source)
    splits = {
        split: Images(*(np.load(data.folder / name, mmap_mode="r", allow_pickle=False) for name in _file_names(split)))
        for split in COUNTS
    }
    return data, splits


def prepare(source: str, root: Path, *, partial: bool, workers: int, report: ReportProgress) -> PreparedData:
    """Decode the images into `root/cifar10`. Raises PreparationError.

    source: hub, or a folder. partial: accept an incomplete or modified data set. workers: not used, as it is one unit.
    """
    if source == "hub":
        files = prepared.download_hub_files(HUB, list(COUNTS))
        units = [
            Unit("all", tuple(str(f) for part in files.values() for f in part), _options(files, "parquet", partial))
        ]
    else:
        units = [_folder_unit(Path(source).expanduser(), partial)]
    folder = root / NAME
    (result,) = prepared.run_units(folder, units, decode_unit, 1, report)
    missing_data = "; ".join(
        f"{result['counts'][split]:,} of {count:,} {split} images"
        for split, count in COUNTS.items()
        if result["counts"][split] != count or not result["balanced"][split]
    )
    if result["other"]:
        missing_data = "; ".join([missing_data, f"other MD5 than released: {', '.join(result['other'])}"]).lstrip("; ")
    data = PreparedData(
        folder,
        NAME,
        source="hub" if source == "hub" else "folder",
        complete=not missing_data,
        missing_data=missing_data,
        content=result["content"],
        counts=result["counts"],
        files=result["files"],
    )
    if missing_data and not partial:
        raise PreparationError(
            f"--source {source}: this is not the complete CIFAR-10 ({missing_data}); {REMEDY}; or {ACCEPT_PARTIAL}"
        )
    prepared.finish_preparation(data)
    return data


def _folder_unit(source: Path, partial: bool) -> Unit:
    """The unit that reads an archive, or a folder with an archive, batches or parquet files."""
    if not source.exists():
        raise PreparationError(f"--source {source}: no such file or folder; {REMEDY}")
    archive = source if source.is_file() else source / ARCHIVE
    if archive.is_file():
        return Unit("all", (str(archive),), {"kind": "archive", "partial": partial})
    for folder in (source, source / "cifar-10-batches-py"):
        paths = {split: [folder / name for name in names] for split, names in BATCHES.items()}
        existing = {split: [path for path in part if path.exists()] for split, part in paths.items()}
        if any(existing.values()):
            missing = sorted(path.name for part in paths.values() for path in part if not path.exists())
            if missing and not (partial and all(existing.values())):
                raise PreparationError(f"--source {source}: {', '.join(missing)} missing from {folder}; {REMEDY}")
            inputs = tuple(str(path) for part in existing.values() for path in part)
            return Unit("all", inputs, _options(existing, "batches", partial))
    parquet = {split: prepared.list_parquet_files(source, split) for split in COUNTS}
    if missing_splits := [split for split, files in parquet.items() if not files]:
        nothing = len(missing_splits) == len(COUNTS)
        problem = "neither CIFAR-10's batches nor parquet files" if nothing else "no parquet file"
        raise PreparationError(f"--source {source}: {problem} of the split {' and '.join(missing_splits)}; {REMEDY}")
    return Unit("all", tuple(str(f) for part in parquet.values() for f in part), _options(parquet, "parquet", partial))


def _options(files: dict[str, list[Path]], kind: str, partial: bool) -> dict[str, Any]:
    """Options of the unit. files: by split. kind: batches or parquet."""
    return {"kind": kind, "partial": partial, "files": {split: [str(f) for f in part] for split, part in files.items()}}


def decode_unit(folder: Path, unit: Unit) -> dict[str, Any]:
    """Write the arrays of both splits; see `prepared.run_units`.

    The result has besides `files`, by split: `counts` of the images, and whether classes are `balanced`; `other`, the
    batches that are not the released ones; and the hash of the `content`.
    """
    options = unit.options
    other: list[str] = []
    if options["kind"] == "archive":
        splits, other = _read_batches(_read_archive(Path(unit.inputs[0])), options["partial"])
    elif options["kind"] == "batches":
        paths = [Path(path) for part in options["files"].values() for path in part]
        splits, other = _read_batches(((path.name, path.read_bytes()) for path in paths), options["partial"])
    else:
        splits = {split: _read_parquet([Path(f) for f in files]) for split, files in options["files"].items()}
    result: dict[str, Any] = {"files": {}, "counts": {}, "balanced": {}, "other": other}
    digests = 0
    for split, images in splits.items():
        for name, array in zip(_file_names(split), images, strict=True):
            with prepared.hashed_writer(folder / name) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            result["files"][name] = prepared.manifest_entry(file, folder / name)
        result["counts"][split] = len(images.labels)
        result["balanced"][split] = len(set(np.bincount(images.labels, minlength=10).tolist())) == 1
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            digest = hashlib.sha256(f"{split} {label} ".encode() + image.tobytes()).digest()
            digests += int.from_bytes(digest, "big")
    # A sum, so that the hash does not depend on the order of the images.
    result["content"] = prepared.content_hash(digests)
    return result


def _file_names(split: str) -> tuple[str, str]:
    """The names of a split's arrays: images and labels."""
    return f"{split}-images.npy", f"{split}-labels.npy"


def _read_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each batch in the release's archive."""
    batches = {name for names in BATCHES.values() for name in names}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = Path(member.name).name
                if member.isfile() and name in batches:
                    file = opened.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise PreparationError(
            f"--source: {archive} cannot be read ({type(error).__name__}: {error}), {INCOMPLETE_DOWNLOAD}; its MD5 "
            f"should be {ARCHIVE_MD5}; {REMEDY}"
        ) from error


def _read_batches(batches: Iterator[tuple[str, bytes]], partial: bool) -> tuple[dict[str, Images], list[str]]:
    """The splits, and the names of the batches that are not the released ones. batches: name and content of each."""
    images, other = {}, []
    released = {name: md5 for names in BATCHES.values() for name, md5 in names.items()}
    for name, content in batches:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != released[name]:
            if not partial:
                raise PreparationError(
                    f"--source: {name} has the MD5 {md5}, the released one {released[name]}; download it again, "
                    f"{REMEDY}; or {ACCEPT_PARTIAL}"
                )
            other.append(name)
        images[name] = _unpickle_batch(name, content)
    splits = {}
    for split, names in BATCHES.items():
        parts = [images[name] for name in names if name in images]
        if not parts or (len(parts) < len(names) and not partial):
            missing = ", ".join(name for name in names if name not in images)
            raise PreparationError(f"--source: {missing} missing; {REMEDY}")
        splits[split] = Images(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    return splits, other


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles a dict of an array and lists, and refuses anything else, since a pickle could call any function."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        # The module's name in the release and in present versions of numpy; the function is that of this version.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _unpickle_batch(name: str, content: bytes) -> Images:
    """The images of a batch of the release. Raises PreparationError if it is damaged."""
    try:
        values = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return _check_images(np.asarray(values[b"data"]).reshape(-1, *PIXELS), values[b"labels"], name)
    except PreparationError:
        raise
    # A damaged pickle can raise any type.
    except Exception as error:
        raise PreparationError(
            f"--source: {name} is not a batch of CIFAR-10 ({type(error).__name__}: {error}), {INCOMPLETE_DOWNLOAD}; "
            f"{REMEDY}"
        ) from error


def _read_parquet(files: Sequence[Path]) -> Images:
    """The images of one split from the hub's files. Raises PreparationError, which names the file and the row."""
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
        # pyarrow and Pillow raise many types; all mean that this file cannot be used.
        except Exception as error:
            raise PreparationError(
                f"--source: {path}, row {row} cannot be read ({type(error).__name__}: {error}); download the file "
                f"again; {REMEDY}"
            ) from error
    return _check_images(np.stack(images) if images else np.empty((0, *PIXELS), np.uint8), labels, files[0].name)


def _check_images(images: np.ndarray, labels: Sequence[int], name: str) -> Images:
    """The arrays as `Images`. Raises PreparationError if shapes, types or labels are wrong. name: of the file."""
    classes = np.asarray(labels)
    fits = images.dtype == np.uint8 and images.shape[1:] == PIXELS and classes.shape == (len(images),) and len(images)
    if not fits or classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() > 9:
        raise PreparationError(
            f"--source: {name} does not hold images of 3 x 32 x 32 bytes with labels from 0 to 9; {REMEDY}"
        )
    return Images(np.ascontiguousarray(images), classes.astype(np.uint8))
