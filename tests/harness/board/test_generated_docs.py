from __future__ import annotations

from pathlib import Path

import pytest

from harness.board.generated_docs import replace_generated, update_document
from harness.errors import UserError

MARK = "<!-- The rest is made by `make it`; a test compares the two. -->"


def test_prose_stays_and_the_rest_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"# Prose\n{MARK}\n\nold\n")
    assert update_document(path, "new\n", "make it", check=True) == 1
    output = capsys.readouterr().out
    assert "-old" in output and "+new" in output and "run: make it" in output
    assert path.read_text().endswith("old\n")
    assert update_document(path, "new\n", "make it", check=False) == 0
    assert path.read_text() == f"# Prose\n{MARK}\n\nnew\n"
    assert update_document(path, "new\n", "make it", check=True) == 0


def test_a_document_without_the_mark_is_refused() -> None:
    with pytest.raises(UserError, match="has no line"):
        replace_generated("# Prose\n", "new\n", "make it")
