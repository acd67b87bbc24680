"""Prepared data sets: what `scripts/prepare_data.py` writes once and every trial reads.

    <root>/<dataset>/
        prepared.json   counts, hashes, and whether this is the whole published data set
        ...             plain arrays, read by memory mapping

Preparation is cut into units (a source file, a class of images). A unit writes its files under temporary names, renames
them when they are whole, and leaves a receipt; so an interrupted preparation goes on after the last whole unit, and
`prepared.json`, which comes last, vouches for everything. No torch in here: worker processes start quickly.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from harness.errors import PreparationError

FORMAT = "pacemark-prepared"
FORMAT_VERSION = 1
MANIFEST = "prepared.json"
RECEIPTS = "units"
ROOT_VARIABLE = "PACEMARK_DATA"

Work = Callable[[Path, "Unit"], dict[str, Any]]
Report = Callable[[int, int], None]
"""Units done, units in all."""


@dataclass(frozen=True)
class Unit:
    """A piece of the source that is prepared in one go."""

    name: str
    inputs: tuple[str, ...]
    """Paths of the files it reads, or a folder."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """Changes when the inputs or the options do."""
        sizes = [os.stat(path).st_size for path in self.inputs]  # noqa: PTH116
        names = [os.path.basename(path) for path in self.inputs]  # noqa: PTH119
        return hashlib.sha256(json.dumps([names, sizes, self.options], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """The contents of prepared.json, and where it lies."""

    folder: Path
    dataset: str
    source: str
    complete: bool
    """Whether it is the whole published data set."""
    missing_data: str
    """What it lacks of that, in words; empty if nothing."""
    content: str
    """SHA-256 of the examples, the same whichever format they came in."""
    counts: dict[str, int]
    files: dict[str, dict[str, Any]]
    """Name -> bytes, sha256, and mtime_ns as of the last time that the hash was checked."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a record says of the data."""
        stream = hashlib.sha256("".join(self.files[name]["sha256"] for name in sorted(self.files)).encode())
        published = "yes" if self.complete else f"no: {self.missing_data}"
        own = {"name": self.dataset, "source": "prepared", "content": self.content, "files": stream.hexdigest()}
        return own | {"published": published} | {f"num_{name}": str(count) for name, count in self.counts.items()}


# ---- where ---------------------------------------------------------------------------------------------------------


def default_root() -> Path:
    """$PACEMARK_DATA, or a folder `pacemark` in the user's cache."""
    if ROOT_VARIABLE in os.environ:
        return Path(os.environ[ROOT_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pacemark"


def folder_of(dataset: str, source: str) -> Path:
    """The folder that `data=source` means: auto, a root, or the data set's own folder."""
    root = default_root() if source == "auto" else Path(source).expanduser()
    return root if (root / MANIFEST).exists() and not (root / dataset).exists() else root / dataset


def how(dataset: str, source: str) -> str:
    root = "" if source in ("auto", "hub") else f" --root {source}"
    return f"prepare it with `python scripts/prepare_data.py {dataset} --source hub|FOLDER{root}`"


def find(dataset: str, source: str) -> Prepared:
    """Read and verify the prepared data set; PreparationError if it is not there, damaged or of another format."""
    if source == "hub":
        raise PreparationError(f"data=hub: {dataset} is not read from the hub while training; "
                               f"{how(dataset, source)}, and leave data=auto")  # fmt: skip
    folder = folder_of(dataset, source)
    found = read(folder, dataset, source)
    if (size := _changed_bytes(found)) > 2e9:
        check = f"python scripts/prepare_data.py {dataset} --check --root {folder.parent}"
        print(
            f"{folder} was copied or touched: hashing {size / 1e9:.0f} GB, as every trial will until `{check}` has",
            file=sys.stderr,
        )
    problem = damage(found)
    if problem is not None:
        raise PreparationError(f"data={source}: {problem}; {how(dataset, source)} again, which mends it")
    return found


def read(folder: Path, dataset: str, source: str = "auto") -> Prepared:
    """prepared.json without a look at the files it names."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = f"{folder} holds no prepared {dataset}"
        if (folder / RECEIPTS).is_dir():
            where += " (its preparation was interrupted; the same command goes on where it stopped)"
        raise PreparationError(f"data={source}: {where}; {how(dataset, source)}") from None
    except (OSError, ValueError) as error:
        raise PreparationError(f"data={source}: {folder / MANIFEST} cannot be read ({error}); {how(dataset, source)}"
                               ) from error  # fmt: skip
    try:
        if (values.pop("format"), values.pop("format_version")) != (FORMAT, FORMAT_VERSION):
            raise PreparationError(f"data={source}: {folder / MANIFEST} is of another version; {how(dataset, source)}")
        # The file calls it by its former name.
        found = Prepared(folder=folder, missing_data=values.pop("lacks"), **values)
    except (AttributeError, KeyError, TypeError) as error:
        raise PreparationError(f"data={source}: {folder / MANIFEST} is no manifest of prepared data ({error}); "
                               f"{how(dataset, source)}") from error  # fmt: skip
    if found.dataset != dataset:
        raise PreparationError(f"data={source}: {folder} holds {found.dataset}, not {dataset}; {how(dataset, source)}")
    return found


def missing_data(dataset: str, source: str) -> str:
    """What the prepared data set lacks of the published one; empty where it lacks nothing, or cannot be read."""
    try:
        return read(folder_of(dataset, source), dataset, source).missing_data
    except PreparationError:
        return ""


def _changed_bytes(prepared: Prepared) -> int:
    """Size of the files that were not hashed since they changed."""
    changed = 0
    for name, wanted in prepared.files.items():
        path = prepared.folder / name
        if path.exists() and path.stat().st_mtime_ns != wanted.get("mtime_ns"):
            changed += wanted["bytes"]
    return changed


def checked(prepared: Prepared) -> Prepared:
    """Write down that the files, as they are now, have the right hashes."""
    files = {name: e | {"mtime_ns": (prepared.folder / name).stat().st_mtime_ns} for name, e in prepared.files.items()}
    found = replace(prepared, files=files)
    _write(found)
    return found


def damage(prepared: Prepared, *, thorough: bool = False) -> str | None:
    """What is wrong with the files, or None.

    A file is hashed where its time of modification is not the one at which it was hashed last; thorough: always.
    """
    for name, wanted in prepared.files.items():
        path = prepared.folder / name
        if not path.exists():
            return f"{path} is missing"
        status = path.stat()
        if status.st_size != wanted["bytes"]:
            return f"{path} has {status.st_size:,} bytes instead of {wanted['bytes']:,}"
        if thorough or status.st_mtime_ns != wanted.get("mtime_ns"):
            found = sha256_of(path)
            if found != wanted["sha256"]:
                return f"{path} has the SHA-256 {found} instead of {wanted['sha256']}"
    return None


# ---- writing -------------------------------------------------------------------------------------------------------


class HashedFile:
    """A file being written, hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.bytes += len(view)
        return len(view)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[HashedFile]:
    """Write `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def entry(file: HashedFile, path: Path) -> dict[str, Any]:
    """What prepared.json says of a file that has been written."""
    return {"bytes": file.bytes, "sha256": file.sha256, "mtime_ns": path.stat().st_mtime_ns}


def run_units(folder: Path, units: Sequence[Unit], work: Work, workers: int, report: Report) -> list[dict[str, Any]]:
    """`work(folder, unit)` for every unit that has no receipt yet; the receipts in the order of `units`.

    work: a function of a module, which writes the unit's files and returns what to remember of it; its key `files`
    holds `entry` by file name. workers: processes; 1 works in this one.
    """
    try:
        (folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        receipts = {unit.name: _receipt(folder, unit) for unit in units}
        pending = [unit for unit in units if receipts[unit.name] is None]
        done = len(units) - len(pending)
        report(done, len(units))
        if workers == 1 or len(pending) <= 1:
            for unit in pending:
                receipts[unit.name] = _do(folder, unit, work)
                done += 1
                report(done, len(units))
        else:
            try:
                _in_processes(folder, pending, work, workers, receipts, lambda n: report(done + n, len(units)))
            except BaseException:
                _remove_leftovers(folder)
                raise
    except OSError as error:
        raise out_of_room(error, folder) from error
    except BrokenProcessPool as error:
        raise PreparationError(f"--workers {workers}: a worker process died, for lack of memory perhaps; give fewer, "
                               "and the same command goes on where it stopped") from error  # fmt: skip
    return [receipt for unit in units if (receipt := receipts[unit.name]) is not None]


def _in_processes(
    folder: Path,
    pending: Sequence[Unit],
    work: Work,
    workers: int,
    receipts: dict[str, Any],
    report: Callable[[int], None],
) -> None:
    # spawn: the parent may hold threads (of pyarrow, of torch), which a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    # A pipe to be closed, not an Event: its `set` waits for all who wait for it, for ever if one is killed meanwhile.
    stop, running = context.Pipe(duplex=False)
    with stop, running, ProcessPoolExecutor(min(workers, len(pending)), context, end_with_parent, (stop,)) as pool:
        futures: dict[Future[dict[str, Any]], Unit] = {pool.submit(_do, folder, u, work): u for u in pending}
        waiting: set[Future[dict[str, Any]]] = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in finished:
                    receipts[futures[future].name] = future.result()
                report(len(futures) - sum(not future.done() for future in futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.close()  # a unit takes minutes, and nobody waits for it any more
            raise


def end_with_parent(stop: Connection | None = None) -> None:
    """In a worker process: end at once when the parent does, however that ended, or closes the other end of `stop`;
    leave Ctrl-C to it."""
    import signal
    import threading
    from multiprocessing.connection import wait as wait_for

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    ends: list[Any] = [parent.sentinel, *([stop] if stop else [])]

    def watch() -> None:
        wait_for(ends)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that ended while it wrote."""
    for path in folder.glob(".*.[0-9]*"):
        path.unlink(missing_ok=True)


def _do(folder: Path, unit: Unit, work: Work) -> dict[str, Any]:
    signature = unit.signature
    result = work(folder, unit)
    with writing(folder / RECEIPTS / f"{unit.name}.json") as file:
        file.write(json.dumps({"signature": signature, "result": result}).encode())
    return result


def _receipt(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """Of a unit done before, from the same inputs, whose files are still as long as they were."""
    try:
        values = json.loads((folder / RECEIPTS / f"{unit.name}.json").read_text(encoding="utf-8"))
        if values["signature"] != unit.signature:
            return None
        result: dict[str, Any] = values["result"]
        sizes = [(folder / name).stat().st_size == wanted["bytes"] for name, wanted in result["files"].items()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if all(sizes) else None


def finish(prepared: Prepared) -> None:
    """Write prepared.json, then forget the receipts and what a former preparation left."""
    folder = prepared.folder
    _write(prepared)
    try:
        shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
        for path in folder.iterdir():
            if path.suffix in (".npy", ".bin") and path.name not in prepared.files:
                path.unlink()
    except OSError as error:
        raise out_of_room(error, folder) from error


def _write(prepared: Prepared) -> None:
    values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(prepared)
    del values["folder"]
    values["lacks"] = values.pop("missing_data")
    try:
        with writing(prepared.folder / MANIFEST) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())
    except OSError as error:
        raise out_of_room(error, prepared.folder) from error


def out_of_room(error: OSError, folder: Path) -> PreparationError:
    """The message of an OSError while something was written into `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return PreparationError(
            f"--root {folder.parent}: the disk is full ({free / 1e9:.1f} GB free); make room or give another folder "
            "with --root; the same command goes on where it stopped"
        )
    name = error.filename if error.filename is not None else folder
    return PreparationError(
        f"{name}: {error.strerror or error}; mend that, and the same command goes on where it stopped"
    )


# ---- reading sources -----------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(digests: int) -> str:
    """Hash of a set of examples from the sum of their SHA-256: independent of their order and of their files."""
    return (digests % 2**256).to_bytes(32, "big").hex()


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Files of a split in a copy of a hub repository: train-00000-of-00080.parquet and the like, at any depth."""
    return sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(split))


def hub_files(name: str, splits: Sequence[str]) -> dict[str, list[Path]]:
    """Parquet files of the hub's data set, downloaded (or found downloaded) by `datasets`, which goes on where it was
    interrupted. name: of a data set on the hub, or a folder in that form."""
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
    except Exception as error:  # datasets and huggingface_hub raise many kinds; all mean that the hub does not serve
        first = (str(error).splitlines() or [""])[0]
        raise PreparationError(
            f"--source hub: {name} cannot be had ({type(error).__name__}: {first}); check the network and, where the "
            "data set asks for it, `hf auth login`; or give a local copy with --source FOLDER"
        ) from error
