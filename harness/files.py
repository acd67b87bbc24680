"""Writing files so that a reader, or a crash at any moment, sees the old content or the new one and nothing between."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_writer(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` in one rename when the body ends.

    The content is on the disk before the rename, and the rename is on return. If the body raises, `path` stays as it
    was and no temporary file is left; a process that is killed leaves `.<name>.<pid>-<random>`, see `remove_leftovers`.
    check: called immediately before the rename; where it raises, as where the body does, `path` stays as it was. Raises
    OSError.
    """
    # In the same folder, since a rename is atomic only within one file system. Two writers never have the same
    # file, not even processes of two machines that have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # Without it a crash of the machine could leave the new name with an empty file.
            os.fsync(file.fileno())
        check()
        # os.replace: the standard library's warning-free name for a rename over an existing file on every system.
        os.replace(temporary, path)  # noqa: PTH105
        _sync_folder(path.parent)
    # BaseException: Ctrl-C must not leave the temporary file behind either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk: without it a crash of the machine could bring the old file back."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    # A folder that may be written and not read, or that another process has moved away with the file in it.
    except (PermissionError, FileNotFoundError):
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # File systems that cannot do it for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes | memoryview, check: Callable[[], None] = lambda: None) -> None:
    """Write `path` whole or not at all; text as UTF-8. check: as `atomic_writer`. Raises OSError."""
    with atomic_writer(path, check) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path, names: tuple[str, ...] = ("",)) -> None:
    """Delete the temporary files of processes that were killed while they wrote a file of `folder`.

    names: prefixes of the names of the files that were written (default: any file). To be called only while no other
    process writes these files.
    """
    for path in folder.glob(".*.[0-9]*"):
        if path.name.startswith(tuple(f".{name}" for name in names)):
            path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise the OSError that writing into `folder` would meet, and leave nothing behind.

    `folder` need not exist; its nearest existing parent is tried.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(20, f"{existing} is not a folder")
    probe = existing / f".pacemark-probe-{os.getpid()}"
    try:
        # A page of content, since a full disk still lets empty files be created.
        probe.write_bytes(b"\0" * 4096)
    finally:
        probe.unlink(missing_ok=True)
