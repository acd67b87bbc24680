"""From folders to archives and back: every byte stays, whatever moment a process is killed at."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.records import packing
from harness.records.layout import archive_of_folder, list_submission_folders
from harness.records.lease import Lease
from harness.records.packing import pack, unpack, unpack_if_packed
from harness.scoring.load_records import load_records
from tests.harness.folders import pacemark_trial
from tests.harness.manifests import write_manifest

pytestmark = pytest.mark.usefixtures("workloads_of_tests")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a submission with two trials and a plan."""
    for study in (0, 1):
        pacemark_trial(tmp_path / "records", [3.0, 2.5, 1.0 + study], study=study, status="reached")
    submission = tmp_path / "records/mini/quick/machine/a"
    write_plan(submission, [(0, 1), (1, 1)])
    return submission


def write_plan(submission: Path, trials: list[tuple[int, int]]) -> None:
    text = f'{{"format": "pacemark-plan", "format_version": 1, "trials": {[list(trial) for trial in trials]}}}'
    (submission / "plan_lm.json").write_text(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trial_folder(folder: Path) -> Path:
    return folder / "study_0/lm_pytorch/trial_1"


def run_in_child(action: Callable[[], object]) -> int:
    """Run `action` in a copy of this process; its exit status: 0, or 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class KillAt:
    """An audit hook that ends the process before its n-th change of the file system, or in the middle of it."""

    def __init__(self, number: int, torn: bool) -> None:
        self.left, self.torn = number, torn

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(arguments[1], str) and set("wx") & set(arguments[1])
        if not (is_write or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
            return
        self.left -= 1
        if self.left == 0:
            if self.torn and is_write:
                descriptor = os.open(arguments[0], os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, b"torn")
            os._exit(9)


def killed_at(number: int, torn: bool, action: Callable[[], object]) -> bool:
    """Run `action` in a process that is killed at its n-th change; whether it came so far."""

    def run() -> None:
        sys.addaudithook(KillAt(number, torn))
        action()

    status = run_in_child(run)
    assert status in (0, 9)
    return status == 9


def test_a_round_trip_keeps_every_byte_and_two_give_the_same_archive(folder: Path) -> None:
    before = contents(folder)
    archive = pack(folder)
    assert archive == folder.with_name("a.tar.xz") and not folder.exists()
    packed = archive.read_bytes()
    assert unpack(archive)
    assert contents(folder) == before and not archive.exists()
    for path in folder.rglob("*.json"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    assert pack(folder).read_bytes() == packed
    assert not unpack(folder.with_name("absent.tar.xz"))
    assert {path.name for path in folder.parent.iterdir()} == {"a.tar.xz"}


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_change_of_the_file_system_nothing_is_lost(folder: Path, torn: bool) -> None:
    """And every reader sees each trial once, and the next process comes to the end."""
    root = folder.parents[3]
    before, table = contents(folder), load_records([root]).trials
    packed = pack(folder).read_bytes()
    archive = archive_of_folder(folder)
    kills = 0
    for action, other in (
        (lambda: unpack(archive), lambda: pack(folder)),
        (lambda: pack(folder), lambda: unpack(archive)),
    ):
        number = 1
        while killed_at(number, torn, action):
            kills, number = kills + 1, number + 1
            records = load_records([root])
            assert records.trials.equals(table) and not records.problems
            assert list_submission_folders(root) == [folder]
            # To its end, whatever is left, and back to where it began.
            action()
            other()
            assert not (folder.exists() and archive.exists())
        other()
        assert {path.name for path in folder.parent.iterdir()} == {"a.tar.xz" if archive.exists() else "a"}
        action()
    assert archive.read_bytes() == packed
    unpack(archive)
    assert contents(folder) == before and kills > 20
    assert {path.name for path in folder.parent.iterdir()} == {"a"}


@pytest.mark.parametrize("action", [pack, lambda folder: unpack(archive_of_folder(folder))])
def test_several_processes_at_once(folder: Path, action: Callable[[Path], object]) -> None:
    before = contents(folder)
    if action is not pack:
        pack(folder)
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                action(folder)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    if action is pack:
        assert not folder.exists()
        unpack(archive_of_folder(folder))
    assert contents(folder) == before and {path.name for path in folder.parent.iterdir()} == {"a"}


def make_running(folder: Path) -> None:
    Lease.acquire(trial_folder(folder))


def make_checkpoint(folder: Path) -> None:
    (trial_folder(folder) / "checkpoint.pt").write_bytes(b"x")


def make_stopped(folder: Path) -> None:
    write_manifest(trial_folder(folder), status="stopped")


def make_damaged(folder: Path) -> None:
    (trial_folder(folder) / "manifest.json").write_text("{")


def make_planned(folder: Path) -> None:
    write_plan(folder, [(0, 1), (7, 1)])


def make_begun(folder: Path) -> None:
    (folder / "study_0/lm_pytorch/trial_3").mkdir()


def make_link(folder: Path) -> None:
    (folder / "plan_other.json").symlink_to(folder / "plan_lm.json")


def make_folder_link(folder: Path) -> None:
    (folder / "study_5").symlink_to(folder / "study_0")


def make_stranger(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")


def make_many_strangers(folder: Path) -> None:
    (trial_folder(folder) / "tensorboard").mkdir()
    for number in range(9):
        (trial_folder(folder) / "tensorboard" / f"events.{number}").touch()


def make_large(folder: Path) -> None:
    with (trial_folder(folder) / "eval_measurements.csv").open("wb") as file:
        file.truncate(2**26 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make_running, r"\.lease/\w+: the trial is running, or was killed; finish it"),
        (make_checkpoint, "checkpoint.pt: the trial can be continued from its checkpoint"),
        (make_stopped, "trial_1: the trial is stopped; finish it"),
        (make_damaged, "manifest.json cannot be read"),
        (make_planned, "study_7/lm_pytorch/trial_1: the trial has not begun"),
        (make_begun, "study_0/lm_pytorch/trial_3: the trial has not begun"),
        (make_link, "plan_other.json is a link"),
        (make_folder_link, "study_5 is no file of a record"),
        (make_stranger, r"notes.txt is no file of a record \(of a tracker\?\); move it away"),
        (make_many_strangers, r"events.0 is no file.*\n.*events.1 .*\n.*events.2 .*\n.* has 6 more such files"),
        (make_large, "more than 64 MiB"),
    ],
)
def test_what_is_unfinished_or_no_record_is_left_as_it_is(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        pack(folder)
    assert contents(folder) == before and {path.name for path in folder.parent.iterdir()} == {"a"}


def test_a_trial_that_begins_while_its_submission_is_packed_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the two moments: before the comparison, and between it and the removal of the folder."""
    begun = folder / "study_9/lm_pytorch/trial_1/manifest.json"
    before = contents(folder)
    read_whole, rename = packing._read_whole, Path.rename

    def begin() -> None:
        begun.parent.mkdir(parents=True)
        begun.write_text("begun")

    def read_and_begin(archive: Path) -> dict[str, bytes]:
        begin()
        return read_whole(archive)

    def begin_and_rename(path: Path, target: Path) -> Path:
        if path == folder:
            begin()
        return rename(path, target)

    for owner, name, replacement in ((packing, "_read_whole", read_and_begin), (Path, "rename", begin_and_rename)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            with pytest.raises(UserError, match="was changed while it was packed"):
                pack(folder)
        assert contents(folder) == before | {"study_9/lm_pytorch/trial_1/manifest.json": b"begun"}
        assert {path.name for path in folder.parent.iterdir()} == {"a"}
        begun.unlink()
        begun.parent.rmdir()
        begun.parents[1].rmdir()
        begun.parents[2].rmdir()


def test_a_folder_beside_its_archive_gets_what_it_lacks(folder: Path) -> None:
    before = contents(folder)
    archive = pack(folder)
    added = pacemark_trial(folder.parents[3], [3.0, 1.0], study=5, status="reached")
    unpack_if_packed(folder)
    assert contents(folder).items() >= before.items() and added.is_dir()
    assert len(contents(folder)) == len(before) + 2 and not archive.exists()


def test_a_folder_that_differs_from_its_archive_is_a_question_for_the_user(folder: Path) -> None:
    archive = pack(folder)
    packed = archive.read_bytes()
    pacemark_trial(folder.parents[3], [3.0, 1.0], status="reached")
    before = contents(folder)
    with pytest.raises(UserError, match=r"both hold study_0/lm_pytorch/trial_1/.*remove the one that is out of date"):
        unpack(archive)
    with pytest.raises(UserError, match="is there already, and its"):
        pack(folder)
    assert archive.read_bytes() == packed and contents(folder) == before


def test_a_damaged_archive_is_not_unpacked(folder: Path) -> None:
    archive = pack(folder)
    archive.write_bytes(archive.read_bytes()[:-200])
    damaged = archive.read_bytes()
    with pytest.raises(UserError) as caught:
        unpack_if_packed(folder)
    assert "damaged (it is cut off)" in caught.value.messages[0] and "git checkout" in caught.value.messages[-1]
    assert archive.read_bytes() == damaged and {path.name for path in folder.parent.iterdir()} == {"a.tar.xz"}


def test_the_user_is_told_once(folder: Path) -> None:
    lines: list[str] = []
    unpack_if_packed(folder, lines.append)
    pack(folder)
    unpack_if_packed(folder, lines.append)
    unpack_if_packed(folder, lines.append)
    assert len(lines) == 1 and lines[0].startswith("unpacked ") and "scripts/records.py pack" in lines[0]


def test_a_process_that_lost_its_lease_removes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was suspended so long that another one took over."""
    monkeypatch.setattr(Lease, "is_owned", lambda lease: False)
    before = contents(folder)
    with pytest.raises(UserError, match="taken over by another process"):
        pack(folder)
    assert contents(folder) == before and not archive_of_folder(folder).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error(folder: Path) -> None:
    folder.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be read or written"):
            pack(folder)
    finally:
        folder.parent.chmod(0o700)
