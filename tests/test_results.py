"""The committed boards are what the committed records give: each says which command made it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOARDS = sorted(ROOT.glob("results/*/leaderboard/LEADERBOARD.md"))


def test_there_is_a_board() -> None:
    assert BOARDS


@pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.parents[1].name)
def test_the_committed_board_is_what_its_records_give(board: Path) -> None:
    (line,) = [line for line in board.read_text().splitlines() if line.startswith("    python scripts/leaderboard.py")]
    command = [sys.executable, *shlex.split(line)[1:], "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
