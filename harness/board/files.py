"""The files of a leaderboard: scores.csv, times.csv, LEADERBOARD.md, leaderboard.tex and the page under site/; where
studies have several trials also tunability.csv and bands.csv."""

from __future__ import annotations

import math
import re
from pathlib import Path

from harness.board.csv_tables import format_csv
from harness.board.latex import format_latex
from harness.board.markdown import format_markdown
from harness.board.page_data import page_data
from harness.errors import UserError
from harness.files import write_atomically
from harness.scoring.leaderboard import Leaderboard


def format_files(board: Leaderboard, title: str, commands: list[str]) -> dict[str, str]:
    """The content of every file but the page, by name. commands: those that make the board again."""
    contents = {
        "scores.csv": format_csv(board.scores),
        "times.csv": format_csv(board.times),
        "LEADERBOARD.md": format_markdown(board, title, commands),
        "leaderboard.tex": format_latex(board, title),
    }
    if board.tunability is not None:
        contents["tunability.csv"] = format_csv(board.tunability.cells)
        contents["bands.csv"] = format_csv(board.tunability.bands)
    return contents


def write_board(board: Leaderboard, folder: Path, title: str, commands: list[str], *, page: bool = True) -> None:
    """Write the files into `folder`, each whole or not at all, and nothing outside it. Raises UserError where it cannot
    be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in format_files(board, title, commands).items():
            write_atomically(folder / name, content)
        if page:
            # Brings the libraries of the page, which --check need not wait for.
            from harness.board.page.site import write_page

            write_page(page_data(board, title, commands), folder / "site")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from error


def compare_board(board: Leaderboard, folder: Path, title: str, commands: list[str]) -> list[str]:
    """A line for each line of a file in `folder` that is not what the records give; empty if there is none.

    Numbers may differ in the last digits, as between machines. The page is not compared.
    """
    differing = []
    for name, content in format_files(board, title, commands).items():
        try:
            committed = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            differing.append(f"{folder / name}: {error.strerror}")
            continue
        before, after = committed.splitlines(), content.splitlines()
        if len(before) != len(after):
            differing.append(f"{folder / name}: {len(before)} lines, the records give {len(after)}")
        for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
            if not _same_line(old, new):
                differing.append(f"{folder / name}:{number}\n  there   {old}\n  records {new}")
    return differing


# Not the digits within a name (resnet50) or behind a dot (v0.5).
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def _same_line(old: str, new: str) -> bool:
    if old == new:
        return True
    # The text around the numbers has to be the same, so both lines have equally many.
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(a == b or math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=_last_digit(a, b)) for a, b in pairs)


def _last_digit(*numbers: str) -> float:
    """One unit in the last place of numbers that were rounded for reading; 0 for whole and for long ones."""
    # 1.001, since the difference of two decimals one unit apart can be larger by a rounding error.
    digits = {len(number.partition(".")[2]) for number in numbers}
    return 1.001 * 10.0 ** -digits.pop() if len(digits) == 1 and digits <= {1, 2, 3, 4} else 0.0
