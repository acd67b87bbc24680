"""Folders and files that are not what they are named like: each is listed with its reason, and none stops a reader."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.records.trial_folders import LARGEST_MANIFEST
from harness.review.audit import audit
from harness.scoring.leaderboard import score
from harness.scoring.load_records import load_records
from tests.harness.review.forging import honest, write

TRIAL = "mini/external/machine/adamw/study_0/gpt2_pytorch/trial_1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "records", honest())


def reasons(root: Path) -> dict[str, str]:
    """What reading reports, by path; an audit reports it too."""
    problems = {p.path: p.message for p in load_records([root]).problems if not p.message.startswith("note: ")}
    audited = {finding.path: finding.message for finding in audit([root])[1]}
    assert problems.keys() <= audited.keys()
    return problems


def test_a_misnamed_study_is_listed(root: Path) -> None:
    (root / TRIAL).parents[1].rename(root / "mini/external/machine/adamw/study 0")
    listed = reasons(root)
    assert listed["mini/external/machine/adamw/study 0/gpt2_pytorch"] == (
        "5 trials left out: not in a folder study_<number>/<workload>_pytorch; give it its name back"
    )
    assert "seeds must count up from 0" in listed["adamw on gpt2"]


@pytest.mark.parametrize("name", ["adamw", "gpt2_jax", "study_99999999999", "`x`"])
def test_a_study_under_any_other_name_is_listed(name: str, root: Path) -> None:
    (root / TRIAL).parents[1].rename(root / "mini/external/machine/adamw" / name)
    assert any("5 trials left out" in message for message in reasons(root).values())


@pytest.mark.parametrize("level", [1, 0])
def test_a_linked_folder_is_listed_and_not_followed(level: int, root: Path, tmp_path: Path) -> None:
    folder = (root / TRIAL).parents[level]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert reasons(root)[str(folder.relative_to(root))] == "refused: a link; put the files themselves there"
    assert len(load_records([root]).trials) == 25


@pytest.mark.parametrize("name", ["eval_measurements.csv", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "endless", "folder"])
def test_what_is_no_regular_file_is_not_read(kind: str, name: str, root: Path, tmp_path: Path) -> None:
    path = root / TRIAL / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere" if kind == "link" else "/dev/zero")
    records = load_records([root])
    messages = [problem.message for problem in records.problems if problem.path == TRIAL]
    assert f"{name} refused: no regular file" in messages
    (status,) = records.trials.loc[records.trials["path"] == TRIAL, "status"]
    assert status == ("missing" if name.endswith("csv") else "invalid")
    assert any(finding.path == TRIAL and "no regular file" in finding.message for finding in audit([root])[1])


def test_a_manifest_has_a_limit(root: Path) -> None:
    path = root / TRIAL / "manifest.json"
    path.write_text(path.read_text() + " " * LARGEST_MANIFEST)
    assert "nothing can be checked" in reasons(root)[TRIAL]
    messages = [problem.message for problem in load_records([root]).problems if problem.path == TRIAL]
    assert "manifest.json ignored: larger than 4 MiB" in messages


WRONG: list[Any] = [None, "text", 7, 1e308, -1, True, [], [1], {}, {"a": [1]}, "x" * 3000]
KEYS: list[tuple[str, ...]] = [
    ("config",), ("config", "optimizer"), ("config", "workload"), ("config", "schedule"), ("config", "run_to_end"),
    ("config", "optimizer", "search_space"), ("config", "optimizer", "recipe"), ("config", "optimizer", "wrappers"),
    ("config", "optimizer", "hyperparameters"), ("identity",), ("identity", "workload"), ("identity", "optimizer"),
    ("identity", "optimizer", "search_space"), ("identity", "optimizer", "hyperparameters"), ("identity", "schedule"),
    ("identity", "ruleset"), ("identity", "scale"), ("identity", "seed"), ("identity", "threads"),
    ("identity", "workload", "max_steps"), ("identity", "workload", "eval_every"), ("identity", "workload", "target"),
    ("identity", "workload", "nominal_batch"), ("identity", "workload", "target_version"), ("machine",), ("seeds",),
    ("machine", "device"), ("packages",), ("data",), ("code",), ("needs",), ("final",), ("final", "time_to_target"),
    ("final", "weights_sha256"), ("final", "global_step"), ("hyperparameters",), ("submission",), ("workload",),
    ("evidence",), ("config_hash",), ("modified",), ("target",), ("workload_version",),
]  # fmt: skip


DECIDING = {("identity",), ("identity", "scale"), ("identity", "ruleset")}
"""One scale and one ruleset make a table: records of another are refused as a whole."""


@pytest.mark.parametrize("key", sorted(DECIDING), ids=".".join)
def test_a_table_of_another_scale_or_ruleset_is_made_or_refused(key: tuple[str, ...], tmp_path: Path) -> None:
    for value in WRONG:
        folder = tmp_path / str(WRONG.index(value))
        forge(write(folder, honest()), [(key, value)])
        audit([folder])
        with contextlib.suppress(UserError):
            score(load_records([folder]), mix_machines=True)


@pytest.mark.parametrize("part", range(5))
def test_no_value_of_a_manifest_stops_a_board(part: int, tmp_path: Path) -> None:
    """Each wrong value in two trials of a study, and six studies at a time: to read them takes longer than to look."""
    forgeries = [(key, value) for key in KEYS if key not in DECIDING for value in WRONG][part::5]
    write(tmp_path, honest())
    for start in range(0, len(forgeries), 6):
        batch = forgeries[start : start + 6]
        forge(tmp_path, batch)
        audit([tmp_path])
        score(load_records([tmp_path]), mix_machines=True)


def forge(root: Path, forgeries: Sequence[tuple[tuple[str, ...], Any]]) -> None:
    """Write each of up to six values at its key into the manifests of the first two trials of a study of its own."""
    trials = honest()
    studies = sorted({(trial.label, trial.study) for trial in trials})
    for (label, study), (key, value) in zip(studies, forgeries, strict=False):
        for trial in [t for t in trials if (t.label, t.study) == (label, study)][:2]:
            *outer, last = key
            container = trial.manifest
            for part in outer:
                assert container is not None
                container = container[part]
            assert container is not None
            container[last] = value
            folder = root / f"mini/external/machine/{label}/study_{study}/gpt2_pytorch/trial_{trial.number}"
            (folder / "manifest.json").write_text(json.dumps(trial.manifest))
