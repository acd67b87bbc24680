from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.records import lease as lease_module
from harness.records.lease import EXPIRY_SECONDS, Lease, LeaseLost, current_holder
from tests.processes import DEADLINE_SECONDS, run, wait_until


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lease_file(folder: Path) -> Path:
    (path,) = (folder / ".lease").iterdir()
    return path


def foreign(folder: Path, token: str = "x", age: float = 0.0) -> Path:
    """A lease of another machine, last touched `age` seconds ago, in the place of the one that is there."""
    shutil.rmtree(folder / ".lease", ignore_errors=True)
    (folder / ".lease").mkdir()
    path = folder / ".lease" / token
    content = {"host": "elsewhere", "pid": 1, "started": "1", "executor": "slurm"}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_one_holds_it_until_it_is_released(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path, executor="local")
    assert first is not None and first.is_owned()
    assert Lease.acquire(tmp_path) is None
    holder = current_holder(tmp_path)
    assert holder is not None and (holder.pid, holder.executor) == (os.getpid(), "local")
    first.release()
    assert current_holder(tmp_path) is None and files(tmp_path) == []
    assert Lease.acquire(tmp_path) is not None


def test_of_many_who_try_at_once_one_gets_it(tmp_path: Path) -> None:
    for _ in range(30):
        start = threading.Barrier(8)

        def attempt(_: int, start: threading.Barrier = start) -> Lease | None:
            start.wait(DEADLINE_SECONDS)
            return Lease.acquire(tmp_path)

        with ThreadPoolExecutor(8) as pool:
            acquired = [attempted for attempted in pool.map(attempt, range(8)) if attempted is not None]
        assert len(acquired) == 1
        acquired[0].release()


def test_the_lease_of_a_process_that_died_here_is_free_at_once(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from harness.records.lease import Lease; Lease.acquire(Path({str(tmp_path)!r}))"
    run([sys.executable, "-c", code], check=True)
    dead = lease_file(tmp_path)
    assert current_holder(tmp_path) is None
    assert Lease.acquire(tmp_path) is not None
    assert files(tmp_path) == [".lease"] and lease_file(tmp_path) != dead


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    assert lease is not None
    content = json.loads(lease_file(tmp_path).read_text())
    lease_file(tmp_path).write_text(json.dumps(content | {"started": "12"}))
    assert current_holder(tmp_path) is None


@pytest.mark.parametrize(("age", "alive"), [(0.0, True), (EXPIRY_SECONDS / 2, True), (EXPIRY_SECONDS * 2, False)])
def test_the_lease_of_another_machine_lives_as_long_as_it_is_touched(tmp_path: Path, age: float, alive: bool) -> None:
    foreign(tmp_path, age=age)
    assert (current_holder(tmp_path) is not None) is alive
    assert (Lease.acquire(tmp_path) is None) is alive


def test_clocks_of_machines_are_never_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert current_holder(tmp_path) is not None


def test_a_lease_that_cannot_be_read_is_somebody_elses(tmp_path: Path) -> None:
    """As after a crash of the machine, which can leave a name without its content."""
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".lease" / "3").touch()
    assert Lease.acquire(tmp_path) is None
    os.utime(tmp_path / ".lease" / "3", (1, 1))
    assert Lease.acquire(tmp_path) is not None


def test_what_killed_processes_have_left_of_their_attempts_is_removed(tmp_path: Path) -> None:
    # Killed in `release`, and before and after it had written a lease that it had not put in its place.
    for name in (".lease", ".lease-a", ".lease-b"):
        (tmp_path / name).mkdir()
    (tmp_path / ".lease-b" / "b").touch()
    assert current_holder(tmp_path) is None
    lease = Lease.acquire(tmp_path)
    assert lease is not None and files(tmp_path) == [".lease"]
    lease.release()
    assert files(tmp_path) == []


def test_who_was_taken_over_finds_out_before_it_writes(tmp_path: Path) -> None:
    slow = Lease.acquire(tmp_path)
    assert slow is not None
    other = foreign(tmp_path)
    with pytest.raises(LeaseLost, match="taken over"):
        slow.check()
    slow.release()  # not its own any more
    assert other.exists()


def test_a_lost_lease_is_told_and_a_kept_one_stays_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    lost = threading.Event()
    kept = Lease.acquire(tmp_path)
    assert kept is not None
    file = lease_file(tmp_path)
    os.utime(file, (1, 1))
    kept.start_heartbeat(when_lost=lost.set)
    wait_until(lambda: file.stat().st_mtime != 1)
    assert not lost.is_set()
    foreign(tmp_path)
    assert lost.wait(60)


def test_a_token_lends_the_lease_to_a_child_which_does_not_release_it(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    assert lease is not None
    lent = Lease.acquire(tmp_path, token=lease.holder.token)
    assert lent is not None and lent.is_owned()
    lent.release()
    assert lease.is_owned()
    assert Lease.acquire(tmp_path, token="another") is None


def acquire_as(folder: Path, host: str) -> Lease:
    """The lease, by a process of a machine with this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "host_id", lambda: host)
        lease = Lease.acquire(folder)
    assert lease is not None
    return lease


def test_who_was_suspended_never_takes_a_later_lease_for_its_own(tmp_path: Path) -> None:
    suspended = acquire_as(tmp_path, "A")
    os.utime(lease_file(tmp_path), (1, 1))
    acquire_as(tmp_path, "B").release()
    now = acquire_as(tmp_path, "C")
    assert now.is_owned() and not suspended.is_owned()
    with pytest.raises(LeaseLost):
        suspended.check()
    suspended.release()
    assert now.is_owned()


def test_who_was_slow_to_take_over_a_dead_lease_takes_none_from_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, age=2 * EXPIRY_SECONDS)
    others: list[Lease] = []

    def stall(folder: Path, holder: lease_module.Holder) -> bool:
        """Long enough for one process to take the dead lease over and release it, and for another to begin anew."""
        monkeypatch.undo()
        acquire_as(folder, "B").release()
        others.append(acquire_as(folder, "C"))
        return False

    monkeypatch.setattr(lease_module, "is_alive", stall)
    assert Lease.acquire(tmp_path) is None
    assert others[0].is_owned()
    assert files(tmp_path) == [".lease"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_in_which_nothing_can_be_written_can_be_looked_at(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lease_module, "_clock_offsets", {})
    foreign(tmp_path)
    monkeypatch.setattr(Path, "touch", fail)
    assert current_holder(tmp_path) is not None
    foreign(tmp_path, age=2 * EXPIRY_SECONDS)
    assert current_holder(tmp_path) is None


def test_many_looks_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Path] = []
    touch = Path.touch

    def count(path: Path) -> None:
        touched.append(path)
        touch(path)

    monkeypatch.setattr(lease_module, "_clock_offsets", {})
    monkeypatch.setattr(Path, "touch", count)
    for name in "abc":
        (tmp_path / name).mkdir()
        foreign(tmp_path / name, age=EXPIRY_SECONDS / 2)
    for _ in range(3):
        assert all(current_holder(tmp_path / name) is not None for name in "abc")
    assert len(touched) == 1
    # Who takes a folder over asks the file system itself.
    assert Lease.acquire(tmp_path / "a") is None and len(touched) == 2
    # A minute later the difference of the clocks is taken anew.
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert current_holder(tmp_path / "a") is not None and len(touched) == 3
