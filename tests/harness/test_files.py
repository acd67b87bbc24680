from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from harness.files import atomic_writer, check_writable, remove_leftovers, write_atomically
from tests import processes


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "before — ä")
    with pytest.raises(ZeroDivisionError), atomic_writer(path) as file:
        file.write(b"half of it")
        file.flush()
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "before — ä"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_writer(path) as file:
        file.write(b"after")
        assert path.read_text(encoding="utf-8") == "before — ä"
    assert path.read_bytes() == b"after"


def test_the_new_name_is_on_the_disk_on_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine must not bring the old file back."""
    path, synced = tmp_path / "file.txt", []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(path, "text")
    (temporary, *is_put_in_place), folder = synced
    assert re.fullmatch(rf"{tmp_path}/\.file\.txt\.{os.getpid()}-[0-9a-f]{{8}}", temporary)
    assert is_put_in_place == [False] and folder == (str(tmp_path), True)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_will_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    write_atomically(tmp_path / "file.txt", "text")
    assert (tmp_path / "file.txt").read_text() == "text"


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")
    code = (
        "import os, signal; from pathlib import Path; from harness.files import atomic_writer\n"
        f"with atomic_writer(Path({str(path)!r})) as file:\n"
        "    file.write(b'x' * 100_000); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = processes.run([sys.executable, "-c", code], cwd=processes.ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".hidden").touch()
    (tmp_path / ".other.1").touch()
    remove_leftovers(tmp_path, ("file.txt",))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".hidden", ".other.1", "file.txt"]
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".hidden", "file.txt"]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        check_writable(tmp_path / "below")
    tmp_path.chmod(0o700)
