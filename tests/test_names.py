"""Names that say nothing stay out of the code: they were its most frequent ones, `at` with seven meanings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("harness", "workloads", "submissions", "scripts", "benchmarks", "tests")
VAGUE = {"at", "found", "own", "said", "what", "where", "tells", "hears", "mine", "here", "whose"}


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def test_no_function_class_argument_or_variable_has_a_vague_name() -> None:
    paths = [ROOT / "run.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
    vague = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in paths
        for line, name in defined_names(ast.parse(path.read_text()))
        if name.strip("_") in VAGUE
    ]
    assert not vague
