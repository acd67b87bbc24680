"""Continuing a trial whose manifest holds values of a wrong type: the command names them or goes on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from harness.command_line import run_script
from harness.records.manifest import Manifest
from scripts import run as command
from tests.conftest import TINY_GPT2

NESTED = "NESTED"
WRONG = [None, 3, -1, "x", True, [], [1], {}, {"a": 1}, float("inf"), float("nan"), "nan", NESTED, 10**400]
BELOW = ["final.traceback", "final.lost_ranks", "final.time_to_target", "final.stop_reason", "final.global_step",
         "final.best_validation/loss", "final.parameters",
         "evidence.lives", "evidence.judge", "evidence.sources", "evidence.kept_weights",
         "identity.workload", "identity.optimizer", "config.optimizer", "machine.device", "code.version",
         "data.train"]  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Any]]:
    """A finished trial: the arguments of its command, its folder and its manifest."""
    records = tmp_path_factory.mktemp("records")
    arguments = [*TINY_GPT2, "optimizer=sgd", f"records={records}", "machine=here"]
    assert call(arguments)[0] == 0
    (path,) = records.rglob("manifest.json")
    return arguments, path.parent, json.loads(path.read_text())


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit status of run.py and what it writes to standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        return run_script(command.main, arguments), errors.getvalue()


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    for part in parts:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize("key", [*Manifest.model_fields, *BELOW])
def test_a_value_of_a_wrong_type_is_named_or_ignored(ended: tuple[list[str], Path, dict[str, Any]], key: str) -> None:
    arguments, folder, good = ended
    for value in WRONG:
        content = json.loads(json.dumps(good))
        put(content, key, value)
        text = json.dumps(content).replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000)
        (folder / "manifest.json").write_text(text)
        status, errors = call(arguments)
        lines = errors.splitlines()
        assert status in (0, 1, 2) and all(line.startswith("error: ") for line in lines), (value, errors)
        assert (status == 2) == bool(lines), (value, errors)
        # What is refused is left as it is.
        assert status != 2 or (folder / "manifest.json").read_text() == text, value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("failures", 3, "failures: must be a valid array"),
        ("data", "x", "data: must be an object"),
        ("final", [], "final: must be an object"),
        ("preemption_count", float("nan"), "preemption_count: must be a"),
        ("preemption_count", 10**400, "preemption_count: "),
        ("identity", None, "identity: must be an object"),
        ("modified", NESTED, "recursion limit"),
    ],
)
def test_an_interrupted_trial_with_a_broken_manifest_is_refused(
    ended: tuple[list[str], Path, dict[str, Any]], key: str, value: Any, message: str
) -> None:
    arguments, folder, good = ended
    text = json.dumps(good | {"status": "stopped", key: value})
    (folder / "manifest.json").write_text(text.replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000))
    status, errors = call(arguments)
    assert status == 2 and "manifest.json cannot be read" in errors and message in errors, errors
    assert "overwrite=true" in errors
