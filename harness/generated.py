"""Documents of which people write the beginning and a script the rest."""

from __future__ import annotations

import difflib
from pathlib import Path

from harness.problems import UserError


def renew(path: Path, made: str, command: str, *, check: bool) -> int:
    """Put `made` in the place of what follows the document's mark, or with `check` only print what would change.

    Returns the exit status: 1 where `check` found a difference.
    """
    committed = path.read_text()
    renewed = replaced(committed, made, command)
    if not check:
        path.write_text(renewed)
        print(f"written: {path}")
        return 0
    differing = list(difflib.unified_diff(committed.splitlines(), renewed.splitlines(), "old", "new", lineterm="", n=0))
    print("\n".join([*differing, f"{path.name} is {'out of date; run: ' + command if differing else 'up to date'}"]))
    return 1 if differing else 0


def replaced(document: str, made: str, command: str) -> str:
    """The document with `made` after the mark; UserError if it has none."""
    mark = f"<!-- The rest is made by `{command}`; a test compares the two. -->"
    before, found, _ = document.partition(mark)
    if not found:
        raise UserError(f"the document has no line {mark}; put one where the generated part should begin")
    return f"{before}{mark}\n\n{made}"
