"""Documents of which people write the first part and a script the rest."""

from __future__ import annotations

import difflib
from pathlib import Path

from harness.errors import UserError
from harness.files import write_atomically


def update_document(path: Path, generated: str, command: str, *, check: bool) -> int:
    """Replace what follows the document's mark by `generated`, or with `check` only print what would change.

    command: the one that does this, which the mark names. Returns the exit status: 1 where `check` found a difference.
    Raises UserError if the document has no mark.
    """
    committed = path.read_text()
    updated = replace_generated(committed, generated, command)
    if not check:
        write_atomically(path, updated)
        print(f"written: {path}")
        return 0
    differing = list(difflib.unified_diff(committed.splitlines(), updated.splitlines(), "old", "new", lineterm="", n=0))
    print("\n".join([*differing, f"{path.name} is {'out of date; run: ' + command if differing else 'up to date'}"]))
    return 1 if differing else 0


def replace_generated(document: str, generated: str, command: str) -> str:
    """The document with `generated` after its mark; raises UserError if it has none."""
    mark = f"<!-- The rest is made by `{command}`; a test compares the two. -->"
    before, separator, _ = document.partition(mark)
    if not separator:
        raise UserError(f"the document has no line {mark}; put one where the generated part should begin")
    return f"{before}{mark}\n\n{generated}"
