"""Leases: which process may write a trial's folder, on one machine or on several that share a file system.

A lease is a file `.lease.<n>` in the folder; its holder touches it every few seconds. Whoever finds the last one dead
(not touched for `SECONDS`, or its process gone from this machine) creates number n + 1, which only one can, and a
holder that finds a higher number than its own has lost the folder and must not write again. Ages are differences of
times that the file system stamped itself, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""A lease that was not touched for so long is dead."""
TOUCH_EVERY = 10.0

_NAME = re.compile(r"\.lease\.(\d{1,9})")


class LeaseLost(Exception):
    """Another process has taken the folder over, after this one had not been heard of."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder."""

    number: int
    token: str
    host: str
    pid: int
    started: str
    """Start time of the process, so that another one with its number is not taken for it; empty where unknown."""
    executor: str = ""


class Lease:
    """Held from `take` to `release`; touched by a thread of this process."""

    def __init__(self, folder: Path, holder: Holder, *, borrowed: bool = False) -> None:
        self.folder, self.holder, self.borrowed = folder, holder, borrowed
        self._path = folder / f".lease.{holder.number}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def take(cls, folder: Path, *, executor: str = "", token: str | None = None) -> Lease | None:
        """The lease of `folder`, or None while somebody else holds it. The folder must exist; OSError if it cannot be
        written. token: that of a lease which the parent process holds and has lent to this one."""
        last = _last(folder)
        if last is not None and token is not None and last.token == token:
            return cls(folder, last, borrowed=True)
        if last is not None and is_alive(folder, last):
            return None
        holder = Holder(
            number=last.number + 1 if last else 1,
            token=uuid.uuid4().hex,
            host=host_id(),
            pid=os.getpid(),
            started=start_of(os.getpid()) or "",
            executor=executor,
        )
        lease = cls(folder, holder)
        try:
            with lease._path.open("x") as file:
                json.dump({k: v for k, v in vars(holder).items() if k != "number"}, file)
        except FileExistsError:
            return None
        # Somebody may have listed the folder just before, or taken and released it between our look and our file.
        if any(number > holder.number for number, _ in _files(folder)):
            lease._path.unlink(missing_ok=True)
            return None
        for number, path in _files(folder):
            if number < holder.number:
                path.unlink(missing_ok=True)
        return lease

    def keep(self, when_lost: Callable[[], None] | None = None) -> Lease:
        """Touch the lease from a thread until it is released or lost."""
        if not self.borrowed:
            self._thread = threading.Thread(target=self._touch, args=(when_lost,), daemon=True)
            self._thread.start()
        return self

    def check(self) -> None:
        """Raise LeaseLost if this process may not write any more."""
        if not self.is_held():
            raise LeaseLost(f"{self.folder} was taken over by another process")

    def is_held(self) -> bool:
        numbers = [number for number, _ in _files(self.folder)]
        return bool(numbers) and max(numbers) == self.holder.number

    def release(self) -> None:
        self._stop.set()
        if not self.borrowed and self.is_held():
            self._path.unlink(missing_ok=True)

    def _touch(self, when_lost: Callable[[], None] | None) -> None:
        while not self._stop.wait(TOUCH_EVERY):
            try:
                held = self.is_held()
                if held:
                    os.utime(self._path)
            except OSError:
                continue  # a file server that does not answer; the next round may
            if not held:
                if when_lost is not None and not self._stop.is_set():
                    when_lost()
                return


def holder_of(folder: Path) -> Holder | None:
    """Who holds `folder` now, if anybody does."""
    last = _last(folder)
    return last if last is not None and is_alive(folder, last) else None


def is_alive(folder: Path, holder: Holder) -> bool:
    if holder.host == host_id():
        # On this machine there is no need to wait.
        start = start_of(holder.pid)
        return start is not None and (not holder.started or start == holder.started)
    try:
        touched = (folder / f".lease.{holder.number}").stat().st_mtime
        return _now(folder) - touched < SECONDS
    except FileNotFoundError:
        return False


def _now(folder: Path) -> float:
    """The time of the file system that holds `folder`."""
    probe = folder / f".now.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _files(folder: Path) -> list[tuple[int, Path]]:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    found = ((_NAME.fullmatch(name), name) for name in names)
    return [(int(match[1]), folder / name) for match, name in found if match]


def _last(folder: Path) -> Holder | None:
    files = _files(folder)
    if not files:
        return None
    number, path = max(files)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Holder(number=number, **content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Written this moment by somebody else: unknown, but alive until it is too old.
        return Holder(number, "", "", 0, "")


def host_id() -> str:
    """This machine, as far as process numbers are its own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def start_of(pid: int) -> str | None:
    """When the process `pid` of this machine began; None if there is none, empty where it cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    return None if fields[0] == "Z" else fields[19]
