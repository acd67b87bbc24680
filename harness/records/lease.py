"""Leases: which process may write a trial's folder, on one machine or on several that share a file system.

A lease is a file `.lease/<token>` in the folder, with a random token as its name. Its holder touches it every few
seconds, the heartbeat. Whoever finds it dead (no heartbeat for `EXPIRY_SECONDS`, or its process gone from this machine)
removes it and takes the place; a holder whose file is gone has lost the folder and must not write again.

Every operation names the token, so a process that was suspended anywhere within it can only ever touch or remove its
own lease, or one that it has seen dead, and never that of who came later. A folder `.lease` comes into being by the
rename of one that holds a file already. A rename replaces an empty folder and fails on any other, so of several
processes one gets the place, and there are never two files in it.
Ages are differences of times that the file system stamped itself, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import LeaseLost
from harness.processes import host_id, process_start_time

logger = logging.getLogger(__name__)

EXPIRY_SECONDS = 60.0
"""A lease of another machine without a heartbeat for so long is dead."""
# A sixth of the expiry, since a busy file server can swallow some of the beats.
HEARTBEAT_SECONDS = 10.0

_PLACE = ".lease"
_NO_FILE = (errno.ENOENT, errno.ESTALE)
"""Errors of a file that is gone, the second one from a file server."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder."""

    token: str
    """Random, and the name of the lease's file. A process that is told it may use the lease of its parent."""
    host: str
    """`harness.processes.host_id`: differs wherever a pid means another process."""
    pid: int
    started: str
    """Start time of the process, so that a later one with the same pid is not taken for it; empty where unknown."""
    executor: str = ""
    """Name of the executor that started the process, for the reader of a status."""


class Lease:
    """The right to write a folder, from `acquire` to `release`."""

    def __init__(self, folder: Path, holder: Holder, *, inherited: bool = False) -> None:
        """inherited: the parent process holds the lease, keeps its heartbeat and releases it."""
        self.folder, self.holder, self.inherited = folder, holder, inherited
        self._path = folder / _PLACE / holder.token
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(cls, folder: Path, *, executor: str = "", token: str | None = None) -> Lease | None:
        """The lease of `folder`, or None while another process holds it. The folder must exist; OSError if it cannot
        be written. token: of a lease that the parent process holds and lends to this one."""
        former = _read_holder(folder)
        if former is not None and token is not None and former.token == token:
            return cls(folder, former, inherited=True)
        if former is not None:
            if is_alive(folder, former):
                return None
            # By its name: if another process has taken the place since, its file has another one.
            (folder / _PLACE / former.token).unlink(missing_ok=True)
        holder = Holder(
            token=uuid.uuid4().hex,
            host=host_id(),
            pid=os.getpid(),
            started=process_start_time(os.getpid()) or "",
            executor=executor,
        )
        lease = cls(folder, holder)
        if not lease._take_place():
            return None
        if former is not None:
            logger.info("%s: taken over from process %d of %s, which is gone", folder, former.pid, former.host)
        return lease

    def _take_place(self) -> bool:
        """Put the lease into the folder, unless there is one. Whether it is there."""
        prepared = self.folder / f"{_PLACE}-{self.holder.token}"
        prepared.mkdir()
        try:
            content = {k: v for k, v in vars(self.holder).items() if k != "token"}
            (prepared / self.holder.token).write_text(json.dumps(content))
            # A file system may refuse to replace even an empty folder, which a killed process has left.
            _remove_if_empty(self._path.parent)
            prepared.rename(self._path.parent)
        except OSError as error:
            _remove(prepared)
            # ENOENT: its holder has taken it for what a killed process left.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return False
            raise
        # What processes have left that were killed within this function.
        for leftover in self.folder.glob(f"{_PLACE}-*"):
            _remove(leftover)
        # Not where who has the place took it for one of these.
        return self._path.exists()

    def start_heartbeat(self, when_lost: Callable[[], None] | None = None) -> Lease:
        """Touch the lease from a thread until it is released or lost; `when_lost` is then called in that thread."""
        if not self.inherited:
            # A daemon, so that a process which ends without `release` is not kept alive by its heartbeat.
            self._thread = threading.Thread(target=self._beat, args=(when_lost,), daemon=True)
            self._thread.start()
        return self

    def check(self) -> None:
        """Raise LeaseLost if this process may not write any more."""
        if not self.is_owned():
            raise LeaseLost(f"lost the lease of {self.folder}: it was taken over by another process")

    def is_owned(self) -> bool:
        """Whether no other process has taken the folder over."""
        try:
            # Opened, since a client of a file server answers by its memory where it is only asked for a name.
            self._path.open("rb").close()
        except OSError as error:
            if error.errno in _NO_FILE:
                return False
            raise
        return True

    def release(self) -> None:
        """Give the folder free, unless it was lost or belongs to the parent process."""
        # First, or the heartbeat would take the missing file for a loss and call `when_lost`.
        self._stop.set()
        if not self.inherited:
            self._path.unlink(missing_ok=True)
            _remove_if_empty(self._path.parent)

    def _beat(self, when_lost: Callable[[], None] | None) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError as error:
                if error.errno not in _NO_FILE:
                    # A file server that does not answer now may answer the next time.
                    logger.warning("%s: no heartbeat this time: %s", self.folder, error)
                    continue
                if not self._stop.is_set():
                    logger.warning(
                        "%s: taken over by another process, since this one missed its heartbeats", self.folder
                    )
                if when_lost is not None and not self._stop.is_set():
                    when_lost()
                return


def current_holder(folder: Path) -> Holder | None:
    """The process that holds `folder` now; None if there is none or it is dead (see `is_alive`)."""
    holder = _read_holder(folder)
    return holder if holder is not None and is_alive(folder, holder, _recent_file_system_time) else None


def is_alive(folder: Path, holder: Holder, file_system_time: Callable[[Path], float] | None = None) -> bool:
    """Whether the holder of a lease is still at it, as far as can be told from this machine.

    For a holder on another machine a temporary file is written into `folder`, for the time by the file system's clock.
    In a folder that cannot be written, which this process cannot take over either, this machine's clock has to do.
    file_system_time: another way to that time.
    """
    if holder.host == host_id():
        # On this machine there is no need to wait for the heartbeat to expire.
        start_time = process_start_time(holder.pid)
        # Where the start time was unknown, the pid alone decides.
        return start_time is not None and (not holder.started or start_time == holder.started)
    try:
        last_heartbeat = (folder / _PLACE / holder.token).stat().st_mtime
        return (file_system_time or _file_system_time)(folder) - last_heartbeat < EXPIRY_SECONDS
    except FileNotFoundError:
        # It was released since it was read.
        return False


def _file_system_time(folder: Path) -> float:
    """The time now by the clock of the file system that holds `folder`, or by this machine's if it is read-only."""
    probe = folder / f".now.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


_CLOCK_SECONDS = 60.0
"""How long the difference between a file system's clock and this process's is used before it is taken anew."""
_clock_offsets: dict[int, tuple[float, float]] = {}
"""By device number: that difference, and when it was taken."""


def _recent_file_system_time(folder: Path) -> float:
    """As `_file_system_time`, with one temporary file a minute for all folders of a file system: a display looks at
    many trials again and again. After a suspension of this machine it is early until the next one, so that a lease
    seems younger than it is, and nobody is taken for dead."""
    device, now = folder.stat().st_dev, time.monotonic()
    offset, taken = _clock_offsets.get(device, (0.0, -_CLOCK_SECONDS))
    if now - taken >= _CLOCK_SECONDS:
        offset, taken = _file_system_time(folder) - now, now
        _clock_offsets[device] = offset, taken
    return now + offset


def _read_holder(folder: Path) -> Holder | None:
    """Who has the place in `folder`, dead or alive."""
    try:
        path = next((folder / _PLACE).iterdir(), None)
    except FileNotFoundError:
        return None
    if path is None:
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Holder(token=path.name, **content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Damaged: unknown, but alive until it is too old.
        return Holder(path.name, "", 0, "")


def _remove(folder: Path) -> None:
    """Remove a folder that never got the place, whoever made it."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
