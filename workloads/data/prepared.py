"""Prepared data sets: `scripts/prepare_data.py` writes them once and every trial reads them.

    <root>/<dataset>/
        prepared.json   counts, hashes, and whether this is the complete published data set
        ...             plain arrays, read by memory mapping

Preparation is cut into units, such as a source file or some classes of images. A unit writes its files under temporary
names, renames them when they are complete, and leaves a receipt. An interrupted preparation resumes after the last
complete unit. `prepared.json` is written last and has the hashes of all files. This module does not import torch, so
that worker processes start quickly.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from harness.errors import PreparationError
from harness.files import atomic_writer, remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

FORMAT = "pacemark-prepared"
FORMAT_VERSION = 1
MANIFEST = "prepared.json"
RECEIPTS = "units"
ROOT_VARIABLE = "PACEMARK_DATA"
RESUME = "the same command resumes where it stopped"
"""End of the messages about a preparation that was interrupted."""
INCOMPLETE_DOWNLOAD = "perhaps an incomplete download"
"""Part of the messages about sources that cannot be read."""

PrepareUnit = Callable[[Path, "Unit"], dict[str, Any]]
"""Prepares one unit in a folder and returns its result, see `run_units`."""
ReportProgress = Callable[[int, int], None]
"""Called with the number of finished units and of all units."""


@dataclass(frozen=True)
class Unit:
    """A part of the source that is prepared at once."""

    name: str
    inputs: tuple[str, ...]
    """Paths of the files it reads, or a folder."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """A hash that changes with the names or sizes of the inputs, or with the options."""
        # os rather than pathlib: a unit may have 20,000 inputs.
        sizes = [os.stat(path).st_size for path in self.inputs]  # noqa: PTH116
        names = [os.path.basename(path) for path in self.inputs]  # noqa: PTH119
        return hashlib.sha256(json.dumps([names, sizes, self.options], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PreparedData:
    """The contents of prepared.json, and its folder."""

    folder: Path
    dataset: str
    source: str
    complete: bool
    """Whether it is the complete published data set."""
    missing_data: str
    """What is missing from the published data set, as a phrase for messages; empty if nothing."""
    content: str
    """SHA-256 of the examples, independent of the format of the source."""
    counts: dict[str, int]
    files: dict[str, dict[str, Any]]
    """By file name: bytes, sha256, and mtime_ns when the hash was last checked."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The description of the data for the record of a trial."""
        stream = hashlib.sha256("".join(self.files[name]["sha256"] for name in sorted(self.files)).encode())
        identity = {"name": self.dataset, "source": "prepared", "content": self.content, "files": stream.hexdigest()}
        published = "yes" if self.complete else f"no: {self.missing_data}"
        counts = {f"num_{name}": str(count) for name, count in self.counts.items()}
        return identity | {"published": published} | counts


# ---- reading prepared data -----------------------------------------------------------------------------------------


def default_root() -> Path:
    """$PACEMARK_DATA, or the folder `pacemark` in the user's cache."""
    if ROOT_VARIABLE in os.environ:
        return Path(os.environ[ROOT_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pacemark"


def prepared_folder(dataset: str, source: str) -> Path:
    """The folder of a data set for `data=source`, which is auto, a root, or the data set's folder itself."""
    root = default_root() if source == "auto" else Path(source).expanduser()
    return root if (root / MANIFEST).exists() and not (root / dataset).exists() else root / dataset


def remedy(dataset: str, source: str) -> str:
    """The end of a message about missing or damaged data: the command that prepares them."""
    root = "" if source in ("auto", "hub") else f" --root {source}"
    return f"prepare it with `python scripts/prepare_data.py {dataset} --source hub|FOLDER{root}`"


def open_prepared(dataset: str, source: str) -> PreparedData:
    """Read and verify a prepared data set. Raises PreparationError if it is missing, damaged or of another format."""
    if source == "hub":
        raise PreparationError(f"data=hub: {dataset} is not read from the hub while training; "
                               f"{remedy(dataset, source)}, and leave data=auto")  # fmt: skip
    folder = prepared_folder(dataset, source)
    prepared = read_manifest(folder, dataset, source)
    if (size := _count_changed_bytes(prepared)) > 2e9:
        check = f"python scripts/prepare_data.py {dataset} --check --root {folder.parent}"
        logger.warning(
            "%s: files were copied or touched; hashing %.0f GB, in every trial until you run `%s`",
            folder, size / 1e9, check,
        )  # fmt: skip
    damage = find_damage(prepared)
    if damage is not None:
        raise PreparationError(f"data={source}: {damage}; {remedy(dataset, source)} again, which repairs it")
    return prepared


def read_manifest(folder: Path, dataset: str, source: str = "auto") -> PreparedData:
    """Read prepared.json without checking the files that it names.

    Raises PreparationError if it is missing, damaged, of another version or of another data set. source: the value of
    `data`, for messages.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        interrupted = f" (its preparation was interrupted; {RESUME})" if (folder / RECEIPTS).is_dir() else ""
        raise PreparationError(
            f"data={source}: {folder} holds no prepared {dataset}{interrupted}; {remedy(dataset, source)}"
        ) from None
    except (OSError, ValueError) as error:
        raise PreparationError(f"data={source}: {path} cannot be read ({error}); {remedy(dataset, source)}") from error
    try:
        if (values.pop("format"), values.pop("format_version")) != (FORMAT, FORMAT_VERSION):
            raise PreparationError(f"data={source}: {path} is of another version; {remedy(dataset, source)}")
        # The file uses a former name of the field.
        prepared = PreparedData(folder=folder, missing_data=values.pop("lacks"), **values)
    except (AttributeError, KeyError, TypeError) as error:
        raise PreparationError(
            f"data={source}: {path} is not a manifest of prepared data ({error}); {remedy(dataset, source)}"
        ) from error
    if prepared.dataset != dataset:
        raise PreparationError(
            f"data={source}: {folder} holds {prepared.dataset}, not {dataset}; {remedy(dataset, source)}"
        )
    return prepared


def missing_data(dataset: str, source: str) -> str:
    """What is missing from a prepared data set, see `PreparedData.missing_data`; empty if it cannot be read."""
    try:
        return read_manifest(prepared_folder(dataset, source), dataset, source).missing_data
    except PreparationError:
        return ""


def _count_changed_bytes(prepared: PreparedData) -> int:
    """Total size of the files that changed since their hashes were checked."""
    changed = 0
    for name, expected in prepared.files.items():
        path = prepared.folder / name
        if path.exists() and path.stat().st_mtime_ns != expected.get("mtime_ns"):
            changed += expected["bytes"]
    return changed


def mark_as_checked(prepared: PreparedData) -> PreparedData:
    """Record in prepared.json that the hashes of the files, as they are now, have been checked."""
    files = {
        name: entry | {"mtime_ns": (prepared.folder / name).stat().st_mtime_ns}
        for name, entry in prepared.files.items()
    }
    checked = replace(prepared, files=files)
    _write_manifest(checked)
    return checked


def find_damage(prepared: PreparedData, *, thorough: bool = False) -> str | None:
    """A message about the first file that is missing or damaged, or None.

    A file is hashed only if its time of modification has changed since its last check; thorough: hash every file.
    """
    for name, expected in prepared.files.items():
        path = prepared.folder / name
        if not path.exists():
            return f"{path} is missing"
        status = path.stat()
        if status.st_size != expected["bytes"]:
            return f"{path} has {status.st_size:,} bytes instead of {expected['bytes']:,}"
        if thorough or status.st_mtime_ns != expected.get("mtime_ns"):
            sha256 = hash_file(path)
            if sha256 != expected["sha256"]:
                return f"{path} has the SHA-256 {sha256} instead of {expected['sha256']}"
    return None


# ---- writing -------------------------------------------------------------------------------------------------------


class HashedFile:
    """A binary file that is hashed while it is written. `bytes`: number of bytes written so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        """Write bytes, or a buffer of any type; returns the number of bytes."""
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.bytes += len(view)
        return len(view)

    @property
    def sha256(self) -> str:
        """Hash of the bytes written so far, in hexadecimal."""
        return self._digest.hexdigest()


@contextmanager
def hashed_writer(path: Path) -> Iterator[HashedFile]:
    """Write `path` completely or not at all, as `harness.files.atomic_writer`, and hash it. Raises OSError."""
    with atomic_writer(path) as file:
        yield HashedFile(file)


def manifest_entry(file: HashedFile, path: Path) -> dict[str, Any]:
    """The entry of a written file in prepared.json."""
    return {"bytes": file.bytes, "sha256": file.sha256, "mtime_ns": path.stat().st_mtime_ns}


def run_units(
    folder: Path, units: Sequence[Unit], prepare_unit: PrepareUnit, workers: int, report: ReportProgress
) -> list[dict[str, Any]]:
    """Prepare every unit that has no receipt yet; returns the results of all units in the order of `units`.

    prepare_unit: a function of a module, which writes the unit's files into `folder` and returns a result for its
    receipt; the key `files` of the result has a `manifest_entry` by file name. workers: processes; 1 is this one.
    Raises PreparationError if a source is damaged, or the disk is full.
    """
    try:
        (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        results = {unit.name: _read_receipt(folder, unit) for unit in units}
        pending = [unit for unit in units if results[unit.name] is None]
        done = len(units) - len(pending)
        report(done, len(units))
        if workers == 1 or len(pending) <= 1:
            for unit in pending:
                results[unit.name] = _run_unit(folder, unit, prepare_unit)
                done += 1
                report(done, len(units))
        else:
            try:
                _run_in_processes(
                    folder, pending, prepare_unit, workers, results, lambda count: report(done + count, len(units))
                )
            except BaseException:
                # Workers that were stopped could not remove their temporary files.
                remove_leftovers(folder)
                raise
    except OSError as error:
        raise writing_error(error, folder) from error
    except BrokenProcessPool as error:
        raise PreparationError(f"--workers {workers}: a worker process died, perhaps for lack of memory; give fewer, "
                               f"and {RESUME}") from error  # fmt: skip
    return [result for unit in units if (result := results[unit.name]) is not None]


def _run_in_processes(
    folder: Path,
    pending: Sequence[Unit],
    prepare_unit: PrepareUnit,
    workers: int,
    results: dict[str, Any],
    report: Callable[[int], None],
) -> None:
    """Prepare the pending units in worker processes and put their results into `results`.

    report: called about once a second with the number of finished units.
    """
    # spawn: the parent may hold threads (of pyarrow, of torch), which a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    # Closing a pipe stops the workers. An Event would not do: its `set` waits for all that wait for it, forever if one
    # of them has been killed.
    stop, running = context.Pipe(duplex=False)
    with stop, running, ProcessPoolExecutor(min(workers, len(pending)), context, exit_with_parent, (stop,)) as pool:
        futures: dict[Future[dict[str, Any]], Unit] = {
            pool.submit(_run_unit, folder, unit, prepare_unit): unit for unit in pending
        }
        waiting: set[Future[dict[str, Any]]] = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in finished:
                    results[futures[future].name] = future.result()
                report(len(futures) - sum(not future.done() for future in futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Units that are running would take minutes to finish.
            running.close()
            raise


def exit_with_parent(stop: Connection | None = None) -> None:
    """Make this worker process exit as soon as its parent ends for any reason, or closes the other end of `stop`.

    Ctrl-C is left to the parent.
    """
    import signal
    import threading
    from multiprocessing.connection import wait as wait_for

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    connections: list[Any] = [parent.sentinel, *([stop] if stop else [])]

    def watch() -> None:
        wait_for(connections)
        # Not sys.exit, which in a thread would end only the thread.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_unit(folder: Path, unit: Unit, prepare_unit: PrepareUnit) -> dict[str, Any]:
    """Prepare a unit, write its receipt and return its result."""
    # Before the work: a source that changes meanwhile makes the receipt invalid.
    signature = unit.signature
    result = prepare_unit(folder, unit)
    write_atomically(folder / RECEIPTS / f"{unit.name}.json", json.dumps({"signature": signature, "result": result}))
    return result


def _read_receipt(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """The result of a unit that was prepared before; None if its inputs have changed or its files are incomplete."""
    try:
        values = json.loads((folder / RECEIPTS / f"{unit.name}.json").read_text(encoding="utf-8"))
        if values["signature"] != unit.signature:
            return None
        result: dict[str, Any] = values["result"]
        complete = [(folder / name).stat().st_size == entry["bytes"] for name, entry in result["files"].items()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if all(complete) else None


def finish_preparation(prepared: PreparedData) -> None:
    """Write prepared.json, then delete the receipts and the files of an earlier preparation."""
    folder = prepared.folder
    _write_manifest(prepared)
    try:
        shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
        for path in folder.iterdir():
            if path.suffix in (".npy", ".bin") and path.name not in prepared.files:
                path.unlink()
    except OSError as error:
        raise writing_error(error, folder) from error


def _write_manifest(prepared: PreparedData) -> None:
    values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(prepared)
    del values["folder"]
    values["lacks"] = values.pop("missing_data")
    try:
        write_atomically(prepared.folder / MANIFEST, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise writing_error(error, prepared.folder) from error


def writing_error(error: OSError, folder: Path) -> PreparationError:
    """The PreparationError for an OSError that occurred while writing into `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return PreparationError(
            f"--root {folder.parent}: the disk is full ({free / 1e9:.1f} GB free); make room, or give another folder "
            f"with --root; {RESUME}"
        )
    name = error.filename if error.filename is not None else folder
    return PreparationError(f"{name}: {error.strerror or error}; correct that, and {RESUME}")


# ---- reading sources -----------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(digests: int) -> str:
    """The hash of a set of examples from the sum of their SHA-256, independent of their order and of their files."""
    return (digests % 2**256).to_bytes(32, "big").hex()


def list_parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a copy of a hub repository, such as train-00000-of-00080.parquet, at any depth."""
    return sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(split))


def download_hub_files(name: str, splits: Sequence[str]) -> dict[str, list[Path]]:
    """By split the parquet files of a data set on the hub, downloaded by `datasets` unless they are in its cache.

    An interrupted download resumes. name: of the data set on the hub, or a folder in the same form. Raises
    PreparationError.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name)
        urls = {split: [str(url) for url in (builder.config.data_files or {})[split]] for split in splits}
        manager = datasets.DownloadManager(
            dataset_name=builder.dataset_name, download_config=datasets.DownloadConfig(resume_download=True)
        )
        return {split: [Path(path) for path in manager.download(files)] for split, files in urls.items()}
    except KeyError as error:
        raise PreparationError(f"--source hub: {name} has no split {error}; give a local copy with --source FOLDER"
                               ) from error  # fmt: skip
    # datasets and huggingface_hub raise many types; all mean that the hub cannot be used.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise PreparationError(
            f"--source hub: {name} cannot be downloaded ({type(error).__name__}: {first_line}); check the network and, "
            "if the data set requires it, `hf auth login`; or give a local copy with --source FOLDER"
        ) from error
