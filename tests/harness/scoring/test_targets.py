from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.scoring.targets import read_targets
from tests.harness import algoperf


def written(tmp_path: Path, **changes: Any) -> Path:
    content = {
        "base_workloads": ["lm", "mri"],
        "held_out_workloads": ["lm_tanh"],
        "workloads": {
            "lm": {"target_metric_name": "ppl", "validation_target_value": 22.3},
            "lm_tanh": {"target_metric_name": "ppl", "validation_target_value": 25},
            "mri": {"target_metric_name": "psnr", "target_metric_goal": "maximize", "validation_target_value": 30.0},
        },
    } | changes
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(content))
    return path


def test_directions_are_declared_or_algoperfs_own(tmp_path: Path) -> None:
    targets = read_targets(written(tmp_path))
    assert targets.scored == ("lm", "mri", "lm_tanh")
    assert {name: target.direction for name, target in targets.targets.items()} == {
        "lm": "min", "lm_tanh": "min", "mri": "max"
    }  # fmt: skip


def entry(**values: Any) -> dict[str, Any]:
    return {"workloads": {"lm": {"target_metric_name": "ppl", "validation_target_value": 1} | values}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workloads": {}}, r"workloads.lm: missing.*\n.*workloads.mri: missing"),
        ({"base_workloads": []}, "nothing to score"),
        ({"base_workloads": ["../../etc"]}, "without path separators"),
        ({"held_out_workloads": ["other_tanh"]}, "begins with no base workload"),
        ({"base_workloads": ["lm", "lm", "mri"]}, "is listed twice"),
        (entry(target_metric_name="loss_like"), "say minimize or maximize"),
        (entry(target_metric_goal="up"), "'up'"),
        (entry(validation_target_value="NaN"), "must be a finite number"),
        (entry(validation_target_value=True), "must be a finite number"),
        ({"workloads": {"lm": 3}}, "must be a mapping"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_targets(written(tmp_path, **changes))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["base_workloads", "workloads", "held_out_workloads", "lm"]), x)))  # fmt: skip  # noqa: E501
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("targets") / "targets.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError):
        read_targets(path)


def test_not_json_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_targets(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="is not JSON"):
        read_targets(path)


def test_the_table_of_targets_is_algoperfs() -> None:
    path = algoperf.ARCHIVE / "targets_v05.json"
    if not path.exists():
        pytest.skip("AlgoPerf's targets are not here (ALGOPERF_V05 names their folder)")
    assert read_targets(path) == algoperf.TARGETS
