"""Leases of processes that are suspended at every step of what they do, while others take over.

Three processes A, B and C go for the same folder. A is suspended before one of its steps, which are its calls of the
file system; for the others it is dead then. B takes over and is suspended before one of its own. C comes last and keeps
the lease. Then A and B wake up in either order and go on to their end. All combinations of steps are tried.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.files import remove_leftovers, write_atomically
from harness.records import lease as lease_module
from harness.records.lease import Holder, Lease, LeaseLost
from tests.processes import DEADLINE_SECONDS

STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "open", "iterdir", "glob", "exists", "stat")


class Process:
    """A thread in the place of a process, which does a step whenever it is told to."""

    current = threading.local()

    def __init__(self, name: str, folder: Path, act: Callable[[Process], None]) -> None:
        self.name, self.folder, self.act = name, folder, act
        self.lease: Lease | None = None
        self.is_over = False
        self.errors: list[BaseException] = []
        self.steps = 0
        self._may_go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._waits.acquire(timeout=DEADLINE_SECONDS)

    def _run(self) -> None:
        Process.current.process = self
        self.pause()
        try:
            self.act(self)
        except BaseException as error:
            self.errors.append(error)
        self.is_over = True
        self._waits.release()

    def pause(self) -> None:
        """Called in the thread before each step."""
        self._waits.release()
        self._may_go.acquire()

    def do(self, steps: int = 10**6) -> None:
        """Go on for so many steps, or to the end."""
        for _ in range(steps):
            if self.is_over:
                return
            self.steps += 1
            self._may_go.release()
            assert self._waits.acquire(timeout=DEADLINE_SECONDS)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Let processes pause before each call of the file system. The names of those that are suspended, to be filled in:
    for the others they are dead."""

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            process = getattr(Process.current, "process", None)
            if process is not None:
                process.pause()
            return function(*arguments, **options)

        return step

    for name in STEPS:
        monkeypatch.setattr(Path, name, stepping(getattr(Path, name)))
    monkeypatch.setattr(os, "utime", stepping(os.utime))
    monkeypatch.setattr(os, "replace", stepping(os.replace))
    suspended: set[str] = set()

    def is_alive(folder: Path, holder: Holder, *_: object) -> bool:
        return holder.executor not in suspended

    monkeypatch.setattr(lease_module, "is_alive", is_alive)
    # The disk is not what is tested.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield suspended


def work_and_leave(process: Process) -> None:
    """Take the lease as a trial does, write a file, give a sign of life, and give the lease free."""
    process.lease = lease = Lease.acquire(process.folder, executor=process.name)
    if lease is None:
        return
    try:
        remove_leftovers(process.folder)
        write_atomically(process.folder / "record", process.name, lease.check)
        # The heartbeat.
        os.utime(lease._path)
    except (LeaseLost, FileNotFoundError):
        pass
    lease.release()


def take_and_keep(process: Process) -> None:
    """Take the lease and write a file as its holder."""
    process.lease = Lease.acquire(process.folder, executor=process.name)
    if process.lease is not None:
        # What those have prepared who found their lease in order and were suspended before they put it in place.
        remove_leftovers(process.folder)
        write_atomically(process.folder / "record", process.name, process.lease.check)


def count_steps(folder: Path, act: Callable[[Process], None]) -> int:
    folder.mkdir()
    process = Process("alone", folder, act)
    process.do()
    assert not process.errors and process.lease is not None
    shutil.rmtree(folder)
    return process.steps


def test_whoever_is_suspended_anywhere_disturbs_no_later_holder(tmp_path: Path, in_steps: set[str]) -> None:
    number = count_steps(tmp_path / "alone", work_and_leave)
    assert number >= 15
    kept = 0
    for first in range(number):
        # B has more to do where it finds A dead.
        for second in range(number + 2):
            for order in ("AB", "BA"):
                kept += run_interleaving(tmp_path / "folder", in_steps, first, second, order)
    assert kept == 2 * number * (number + 2)


def run_interleaving(folder: Path, suspended: set[str], first: int, second: int, order: str) -> bool:
    """Whether C got the lease; it must keep it."""
    suspended.clear()
    folder.mkdir()
    a = Process("A", folder, work_and_leave)
    a.do(first)
    suspended.add("A")
    b = Process("B", folder, work_and_leave)
    b.do(second)
    suspended.add("B")
    c = Process("C", folder, take_and_keep)
    c.do()
    kept = c.lease is not None
    # They wake up one after the other; each is alive from then on.
    for process in [a, b] if order == "AB" else [b, a]:
        suspended.discard(process.name)
        while not process.is_over:
            process.do(1)
            if kept:
                check_kept(c, a, b)
    for process in (a, b, c):
        assert not process.errors, (first, second, order, process.name, process.errors)
    if kept:
        assert (folder / "record").read_text() == "C"
        assert c.lease is not None
        c.lease.release()
    assert [path.name for path in folder.iterdir()] == ["record"] * (folder / "record").exists()
    shutil.rmtree(folder)
    return kept


def check_kept(c: Process, *others: Process) -> None:
    """C alone holds the lease, and knows it."""
    assert c.lease is not None and c.lease.is_owned()
    assert lease_module._read_holder(c.folder) == c.lease.holder
    assert not any(process.lease is not None and process.lease.is_owned() for process in others)
