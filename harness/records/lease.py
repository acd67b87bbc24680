"""Leases: which process may write a trial's folder, on one machine or on several that share a file system.

A lease is a file `.lease.<n>` in the folder. Its holder touches it every few seconds, the heartbeat. Whoever finds the
newest one dead (no heartbeat for `EXPIRY_SECONDS`, or its process gone from this machine) creates number n + 1, which
only one process can; a holder whose lease is not the newest any more has lost the folder and must not write again. It
knows its lease by the token in it, and not by the number, since numbers start again at 1 after a release.
Ages are differences of times that the file system stamped itself, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
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

_FILE_NAME = re.compile(r"\.lease\.(\d{1,9})")


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder."""

    number: int
    """Of the lease in the folder; the highest one holds it."""
    token: str
    """Random. A process that is told it may use the lease of its parent."""
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
        self._path = folder / f".lease.{holder.number}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(cls, folder: Path, *, executor: str = "", token: str | None = None) -> Lease | None:
        """The lease of `folder`, or None while another process holds it. The folder must exist; OSError if it cannot
        be written. token: of a lease that the parent process holds and lends to this one."""
        newest = _newest(folder)
        if newest is not None and token is not None and newest.token == token:
            return cls(folder, newest, inherited=True)
        if newest is not None and is_alive(folder, newest):
            return None
        holder = Holder(
            number=newest.number + 1 if newest else 1,
            token=uuid.uuid4().hex,
            host=host_id(),
            pid=os.getpid(),
            started=process_start_time(os.getpid()) or "",
            executor=executor,
        )
        lease = cls(folder, holder)
        try:
            # "x": of several processes that create the same number, one succeeds.
            with lease._path.open("x") as file:
                json.dump({k: v for k, v in vars(holder).items() if k != "number"}, file)
        except FileExistsError:
            return None
        # Another process may have listed the folder before this file existed, or acquired and released the lease
        # between our look and our file. After a release it may also have got a lower number.
        if any(number > holder.number or _is_another(folder, number, newest) for number, _ in lease._list_others()):
            lease._path.unlink(missing_ok=True)
            return None
        # Only after the new file is there: between a removal and a creation another process would find an empty folder
        # and create number 1.
        for number, path in _list_files(folder):
            if number < holder.number:
                path.unlink(missing_ok=True)
        if newest is not None:
            logger.info("%s: taken over from process %d of %s, which is gone", folder, newest.pid, newest.host)
        return lease

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
        newest = _newest(self.folder)
        return newest is not None and newest.token == self.holder.token

    def _list_others(self) -> list[tuple[int, Path]]:
        return [(number, path) for number, path in _list_files(self.folder) if number != self.holder.number]

    def release(self) -> None:
        """Give the folder free, unless it was lost or belongs to the parent process."""
        # First, or the heartbeat would take the missing file for a loss and call `when_lost`.
        self._stop.set()
        if not self.inherited and self.is_owned():
            self._path.unlink(missing_ok=True)

    def _beat(self, when_lost: Callable[[], None] | None) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                owned = self.is_owned()
                if owned:
                    os.utime(self._path)
            except OSError as error:
                # A file server that does not answer now may answer the next time.
                logger.warning("%s: no heartbeat this time: %s", self.folder, error)
                continue
            if not owned:
                if not self._stop.is_set():
                    logger.warning(
                        "%s: taken over by another process, since this one missed its heartbeats", self.folder
                    )
                if when_lost is not None and not self._stop.is_set():
                    when_lost()
                return


def current_holder(folder: Path) -> Holder | None:
    """The process that holds `folder` now; None if there is none or it is dead (see `is_alive`)."""
    newest = _newest(folder)
    return newest if newest is not None and is_alive(folder, newest, _recent_file_system_time) else None


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
        last_heartbeat = (folder / f".lease.{holder.number}").stat().st_mtime
        return (file_system_time or _file_system_time)(folder) - last_heartbeat < EXPIRY_SECONDS
    except FileNotFoundError:
        # It was released since the folder was listed.
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


def _is_another(folder: Path, number: int, dead: Holder | None) -> bool:
    """Whether lease `number` is a live one of a process other than `dead`."""
    if dead is not None and number == dead.number:
        return False
    holder = _read_holder(number, folder / f".lease.{number}")
    return holder is not None and is_alive(folder, holder)


def _list_files(folder: Path) -> list[tuple[int, Path]]:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    matches = ((_FILE_NAME.fullmatch(name), name) for name in names)
    return [(int(match[1]), folder / name) for match, name in matches if match]


def _newest(folder: Path) -> Holder | None:
    files = _list_files(folder)
    return _read_holder(*max(files)) if files else None


def _read_holder(number: int, path: Path) -> Holder | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Holder(number=number, **content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Its holder is writing it this moment: unknown, but alive until it is too old.
        return Holder(number, "", "", 0, "")
