"""Cores and GPUs that the pools of one machine keep from each other.

Two commands may run on one machine at a time, each with workers of its own. A pool locks a file for each core or GPU
that it uses; the system releases the locks when the process ends, however it does. Nothing depends on a lock but which
cores are taken first: where a folder for the files cannot be made, every pool takes the first ones.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FOLDER_VARIABLE = "PACEMARK_MACHINE_FOLDER"
"""Names another folder for the files, which all pools of the machine should share."""


class Reservation:
    """The cores and GPUs that this process has locked."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: of the files; by default one of this user in the machine's folder for temporary files."""
        default = Path(tempfile.gettempdir()) / f"pacemark-machine-{os.getuid()}"
        self._folder = folder or Path(os.environ.get(FOLDER_VARIABLE, default))
        self._files: list[IO[bytes]] = []

    def take(self, kind: str, names: Sequence[str], count: int) -> list[str]:
        """Up to `count` of the names, in their order, that nobody else has locked; locked until `release`.

        kind: what they are, such as core or gpu.
        """
        taken: list[str] = []
        for name in names:
            if len(taken) == count:
                break
            if self._lock(f"{kind}-{name}"):
                taken.append(name)
        return taken

    def release(self) -> None:
        """Unlock all."""
        for file in self._files:
            file.close()
        self._files = []

    def _lock(self, name: str) -> bool:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            file = (self._folder / name).open("ab")
        except OSError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            # Of another process; a file system without locks keeps nobody out.
            return not isinstance(error, BlockingIOError)
        self._files.append(file)
        return True


@contextmanager
def reservation() -> Iterator[Reservation]:
    """A reservation that is released at the end."""
    made = Reservation()
    try:
        yield made
    finally:
        made.release()
