"""From a submission's folder to its archive and back.

Whatever moment a process is killed at, all records are in the folder or in the archive: the first is removed only when
the second is complete. Where both are left, the same call comes to the end. One process at a time is at a submission;
it holds the lease of `.<label>.packing`, a folder beside.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.errors import LeaseLost, ManifestError, UserError
from harness.files import write_atomically
from harness.records.archive import (
    CHECKSUMS,
    LARGEST_MEMBER,
    LARGEST_TOTAL,
    archive_bytes,
    is_member_name,
    read_members,
)
from harness.records.layout import CHECKPOINT, MANIFEST, archive_of_folder, folder_of_archive, trial_number
from harness.records.lease import Lease
from harness.records.manifest import Manifest
from harness.records.plan import parse_plan

_WAIT_SECONDS = 120.0
"""For a process that packs or unpacks the same submission. Longer than a dead lease of another machine is kept."""
_POLL_SECONDS = 0.05


def pack(folder: Path) -> Path:
    """Put the archive of a submission in the place of its folder; the archive.

    Raises UserError, and leaves the folder as it is, where a trial is unfinished, a file is no part of a record, or an
    archive is there already that holds something else.
    """
    archive = archive_of_folder(folder)
    with exclusive_access(folder) as lease:
        if archive.exists() and not folder.exists():
            return archive  # another process has just done it
        files = _read_folder(folder)
        _check_finished(folder, files)
        if archive.exists():
            # Of a process that was killed before it could remove the folder, or of somebody else.
            _check_contained(_read_whole(archive), folder, archive)
        fresh = lease.folder / archive.name
        write_atomically(fresh, archive_bytes(files))
        # Read back from the disk, and compared with what lies in the folder now.
        if not _read_whole(fresh) == files == _read_folder(folder):
            raise UserError(f"{folder} was changed while it was packed; wait for the process that writes there")
        lease.check()
        fresh.replace(archive)
        retired = lease.folder / "retired"
        folder.rename(retired)
        # Since the comparison a process may have begun a trial; once the folder has moved, none can.
        if _list_files(retired) != files.keys():
            _move_missing(retired, folder)
            archive.unlink()
            raise UserError(f"{folder} was changed while it was packed; wait for the process that writes there")
        shutil.rmtree(retired)
    return archive


def unpack(archive: Path) -> bool:
    """Put the folder of a submission in the place of its archive; whether this process has done it, and not another.

    Where the folder is there, files that it lacks are added. Raises UserError, and changes nothing, where a file is
    another in the folder than in the archive, the archive is damaged, or nothing can be written.
    """
    folder = folder_of_archive(archive)
    with exclusive_access(folder) as lease:
        if not archive.exists():
            return False
        files = _read_whole(archive)
        if folder.exists():
            differing = [name for name in files if (folder / name).exists() and _read(folder / name) != files[name]]
            if differing:
                raise UserError(
                    f"{archive} and the folder {folder.name} beside it both hold {differing[0]}, and they differ; "
                    "remove the one that is out of date"
                )
        fresh = lease.folder / "fresh"
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            # On the disk before the archive is removed.
            with (fresh / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        lease.check()
        try:
            fresh.rename(folder)
        except OSError:
            # The folder is there, with files of its own.
            _move_missing(fresh, folder)
        archive.unlink()
    return True


def unpack_if_packed(folder: Path, report: Callable[[str], None] = print) -> None:
    """To be called before trials of the submission with this folder are planned or run: unpack its archive, so that
    none of its trials is begun anew. report: is told so in a line. Raises UserError as `unpack`."""
    archive = archive_of_folder(folder)
    if archive.exists() and unpack(archive):
        report(f"unpacked {archive}; scripts/records.py pack packs it again")


# ---- one process at a time -----------------------------------------------------------------------------------------


@contextmanager
def exclusive_access(folder: Path) -> Iterator[Lease]:
    """The lease of the folder `.<label>.packing`, which is empty: no other process packs, unpacks or plans the
    submission. Raises UserError if another one takes too long, and for every OSError of the body."""
    working = folder.with_name(f".{folder.name}.packing")
    try:
        lease = _acquire(working).start_heartbeat()
        try:
            _remove_leftovers(working, folder)
            try:
                yield lease
            except UserError:
                # Raised on purpose, with everything in its place. After any other error what is left stays.
                _remove_leftovers(working, folder)
                raise
            _remove_leftovers(working, folder)
        finally:
            lease.release()
            # Another process may wait for it, and then it stays until that one has finished.
            with suppress(OSError):
                working.rmdir()
    except LeaseLost as error:
        raise UserError(f"{error}; nothing is lost, and the same command goes on") from error
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read or written ({error.strerror}); nothing is lost, and the same "
            "command goes on"
        ) from error


def _acquire(working: Path) -> Lease:
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        working.mkdir(exist_ok=True)
        # The folder is gone where the process that held it has just finished.
        with suppress(FileNotFoundError):
            lease = Lease.acquire(working)
            if lease is not None:
                return lease
        time.sleep(_POLL_SECONDS)
    raise UserError(
        f"{working} is held by a process that packs, unpacks or plans; wait for it, and run the command again"
    )


def _remove_leftovers(working: Path, folder: Path) -> None:
    """Delete what a killed process has left. All of it is in the archive or in the folder, since either is removed only
    when the other is complete."""
    retired, archive = working / "retired", archive_of_folder(folder)
    if _list_files(retired) and not folder.exists() and not archive.exists():
        raise UserError(f"{retired} holds the only copy of the records; move it to {folder}")
    for leftover in working.iterdir():
        # Of who holds or wants the folder.
        if leftover.name.startswith((".lease", ".now.")):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


# ---- files ---------------------------------------------------------------------------------------------------------


def _list_files(folder: Path) -> set[str]:
    """The files below `folder`, links included, by their path below it; without the checksums that `tar xJf` leaves."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {path.relative_to(folder).as_posix() for path in files} - {CHECKSUMS}


def _read(path: Path) -> bytes:
    if path.is_symlink():
        raise UserError(f"{path} is a link; put the file itself there")
    return path.read_bytes()


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Every file of the folder by name; raises UserError for one that is no part of a record."""
    names = sorted(_list_files(folder))
    strangers = [name for name in names if not is_member_name(name)]
    if strangers:
        # A tracker leaves dozens in each trial.
        messages = [_describe_stranger(folder / name) for name in strangers[:3]]
        raise UserError(messages + [f"{folder} has {len(strangers) - 3} more such files"] * (len(strangers) > 3))
    files = {name: _read(folder / name) for name in names}
    messages = [
        f"{folder / name} has more than {LARGEST_MEMBER >> 20} MiB and is no record; move it away"
        for name, content in files.items()
        if len(content) > LARGEST_MEMBER
    ]
    if sum(map(len, files.values())) > LARGEST_TOTAL:
        messages.append(f"{folder} has more than {LARGEST_TOTAL >> 20} MiB; give some of its studies another label")
    if messages:
        raise UserError(messages)
    return files


def _describe_stranger(path: Path) -> str:
    if path.name == CHECKPOINT:
        return f"{path}: the trial can be continued from its checkpoint; finish it, or delete the checkpoint"
    if path.parent.name.startswith(".lease"):
        return f"{path}: the trial is running, or was killed; finish it"
    return f"{path} is no file of a record (of a tracker?); move it away"


def _check_finished(folder: Path, files: Mapping[str, bytes]) -> None:
    """Raise UserError for trials that are planned and not begun, or begun and not finished."""
    messages = []
    planned: set[str] = set()
    for name, content in files.items():
        if "/" not in name:
            workload = name.removeprefix("plan_").removesuffix(".json")
            trials = parse_plan(content, folder / name)["trials"]
            planned |= {f"study_{study}/{workload}_pytorch/trial_{number}" for study, number in trials}
    # Folders too: of a trial that has just begun, no file is there yet.
    begun = {path.relative_to(folder).as_posix() for path in folder.glob("study_*/*/*") if trial_number(path.name)}
    for trial in sorted(planned | begun):
        content_of_manifest = files.get(f"{trial}/{MANIFEST}")
        if content_of_manifest is None:
            messages.append(f"{folder / trial}: the trial has not begun; run it, or remove it and its plan")
            continue
        try:
            status = Manifest.parse(content_of_manifest).status
        except ManifestError as error:
            messages.append(f"{folder / trial / MANIFEST} cannot be read ({error}); move the folder away")
            continue
        if not status.is_finished:
            messages.append(f"{folder / trial}: the trial is {status}; finish it, or remove it and its plan")
    if not messages and not begun:
        messages.append(f"{folder} holds no trial; give a folder of records")
    if messages:
        raise UserError(messages)


def _read_whole(archive: Path) -> dict[str, bytes]:
    """Every file of an archive by name; raises UserError unless all of them can be trusted."""
    problems: list[str] = []
    files = dict(read_members(archive, problems))
    if problems:
        raise UserError(
            [f"{archive}: {problem}" for problem in problems]
            + [f"{archive} stays as it is; restore it (git checkout), or move it away to run its trials anew"]
        )
    return files


def _check_contained(files: Mapping[str, bytes], folder: Path, archive: Path) -> None:
    """Raise UserError for a file of the archive that the folder lacks or has otherwise."""
    for name, content in files.items():
        path = folder / name
        if not path.exists() or _read(path) != content:
            raise UserError(
                f"{archive} is there already, and its {name} is missing or another in the folder {folder.name}; remove "
                "the one that is out of date, or let scripts/records.py unpack add what the folder lacks"
            )


def _move_missing(source: Path, target: Path) -> None:
    """Move the files that `target` lacks from `source`. The others are equal. No leases: their holders find them lost,
    and another process may have taken the place."""
    for name in sorted(_list_files(source)):
        path = target / name
        if not path.exists() and not path.parent.name.startswith(".lease"):
            path.parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(path)
