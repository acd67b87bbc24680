"""The committed records are packed, and the committed boards are what they give: each says which command made it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from harness.records.archive import archive_bytes, read_members
from tests.processes import call

ROOT = Path(__file__).parents[1]
BOARDS = sorted(ROOT.glob("results/*/leaderboard/LEADERBOARD.md"))


def test_there_is_a_board() -> None:
    assert BOARDS


@pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.parents[1].name)
def test_the_committed_board_is_what_its_records_give(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in board.read_text().splitlines() if line.startswith("    python scripts/leaderboard.py")]
    _, _, *arguments = shlex.split(line)
    monkeypatch.chdir(ROOT)
    done = call("leaderboard", *arguments, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def tracked_files() -> list[Path]:
    """The files below results/ that git knows, so that what a run left there does not count."""
    done = subprocess.run(["git", "ls-files", "-z", "results"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_committed_records_are_packed_and_small() -> None:
    paths = tracked_files()
    assert not [path for path in paths if path.name in ("manifest.json", "eval_measurements.csv")]
    archives = [path for path in paths if path.name.endswith(".tar.xz") and path.exists()]
    trials, total = 0, 0
    for path in archives:
        problems: list[str] = []
        files = dict(read_members(path, problems))
        assert not problems, path
        trials += sum(name.endswith("manifest.json") for name in files)
        total += path.stat().st_size
    assert trials >= 789
    assert total / trials <= 8000, f"{total / trials:.0f} bytes a trial"


def test_a_committed_archive_is_packed_again_to_the_byte() -> None:
    path = next(path for path in tracked_files() if path.name.endswith(".tar.xz") and path.exists())
    assert archive_bytes(dict(read_members(path, []))) == path.read_bytes()
