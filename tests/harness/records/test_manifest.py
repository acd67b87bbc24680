"""A manifest of any shape is read, or refused with one sentence."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.board import files
from harness.board.page_data import page_data
from harness.errors import ManifestError, UserError
from harness.records.layout import RecordPath
from harness.records.manifest import Manifest, ManifestSummary
from harness.records.status import Status
from harness.scoring import leaderboard
from harness.scoring.load_records import load_records
from harness.scoring.trials_table import write_trials_table
from harness.study.status import seconds_left, survey_records
from tests.harness.folders import curve
from tests.harness.manifests import manifest_content

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONTENT = manifest_content(
    workload="gpt2", metric="validation/loss", seeds={"study": 0, "trial": 1, "base": 3}, preemption_count=0,
    failures=["a traceback"], needs=["loss"], data={"train": "0"}, variant_of=None,
    machine={"device": "cpu", "cpu": "x", "threads": 1, "ranks": 1},
    final={"disturbed": False, "time_to_target": 2.0, "steps_to_target": 9, "best_validation/loss": 1.0,
           "peak_memory_bytes": 4, "optimizer_state_bytes_per_parameter": 8.0},
)  # fmt: skip


def key_paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of `value`, however deep."""
    if not isinstance(value, dict):
        return []
    below = [key_paths(item, (*path, key)) for key, item in value.items()]
    return [(*path, key) for key in value] + [deeper for paths in below for deeper in paths]


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A whole manifest in which one or two keys are missing or hold anything."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 2))):
        *parents, key = draw(st.sampled_from(key_paths(content)))
        holder = content
        for parent in parents:
            holder = holder[parent]
        if draw(st.booleans()):
            holder[key] = draw(JSON)
        else:
            del holder[key]
    return content


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = Manifest.parse(json.dumps(CONTENT))
    manifest.write(tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text()) == CONTENT
    assert Manifest.read(tmp_path / "manifest.json") == manifest
    assert Manifest.read(tmp_path / "nothing.json") is None


def test_unknown_keys_survive(tmp_path: Path) -> None:
    Manifest.parse(json.dumps(CONTENT | {"of_a_later_version": {"x": [1]}})).write(tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text())["of_a_later_version"] == {"x": [1]}


def test_what_json_has_no_number_for_is_written_by_name(tmp_path: Path) -> None:
    manifest = Manifest.parse(json.dumps(CONTENT))
    manifest.hyperparameters = {"lr": math.inf, "betas": (0.9, math.nan)}
    manifest.write(tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text())["hyperparameters"] == {
        "lr": "inf",
        "betas": [0.9, "nan"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Invalid JSON"),
        ('{"format"', "Invalid JSON"),
        ("[1]", "object"),
        (b"\xff\xfe", "Invalid JSON"),
        (json.dumps(CONTENT | {"format_version": 2}), "format_version: must be 1"),
        (json.dumps(CONTENT | {"format": "other"}), "format: must be 'pacemark-record'"),
        (json.dumps({k: v for k, v in CONTENT.items() if k != "target"}), "target: Field required"),
        (json.dumps(CONTENT | {"status": "won"}), "status: must be 'running'"),
        (json.dumps(CONTENT | {"status": "missing"}), "missing is no status of a manifest"),
        (json.dumps(CONTENT | {"final": {"time_to_target": "soon"}}), "final.time_to_target: must be a valid number"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_bad_manifest_names_the_key(content: str | bytes, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(content)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(content=st.binary(max_size=40) | JSON.map(json.dumps) | damaged().map(json.dumps))
@settings(max_examples=200)
def test_any_text_is_a_manifest_or_an_error(content: bytes | str) -> None:
    try:
        manifest = Manifest.parse(content)
    except ManifestError as error:
        assert str(error)
        return
    assert manifest.status in Status
    for text in (manifest.scale, manifest.ruleset, manifest.metric_name):
        assert isinstance(text, str)
    assert manifest.max_steps is None or manifest.max_steps > 0
    assert manifest.machine_folder is None or isinstance(manifest.machine_folder, str)


@given(content=st.binary(max_size=40) | JSON.map(json.dumps) | damaged().map(json.dumps))
@settings(max_examples=200)
def test_a_summary_is_what_the_manifest_has(content: bytes | str) -> None:
    """A file that is a manifest has a summary; one that has no summary is no manifest."""
    try:
        summary = ManifestSummary.parse(content)
    except ManifestError as error:
        assert str(error) and "\n" not in str(error)
        with pytest.raises(ManifestError):
            Manifest.parse(content)
        return
    with suppress(ManifestError):
        manifest = Manifest.parse(content)
        assert {name: getattr(manifest, name) for name in ManifestSummary.model_fields} == dict(summary)


@given(content=damaged())
@settings(max_examples=30)
def test_a_status_and_a_board_from_a_damaged_manifest_are_made_or_refused(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("records")
    for label, manifest in (("b", CONTENT | {"submission": "b"}), ("a", content)):
        for study in (0, 1):
            path = RecordPath(root, "mini", "quick", "m", label, study, "gpt2", 1)
            path.folder.mkdir(parents=True)
            path.evaluations.write_text(curve([3.0, 2.0, 1.0]))
            path.manifest.write_text(json.dumps(manifest))
    trials, _ = survey_records(root)
    seconds_left(trials)
    try:
        records = load_records([root])
        write_trials_table(records, root / "trials.csv")
        board = leaderboard.score(records)
        files.write_board(board, root / "board", "Board", [], page=False)
        page_data(board, "Board", [])
    except UserError as error:
        assert error.messages
