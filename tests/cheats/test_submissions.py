"""What becomes of each cheat: it gains nothing, its trial ends, or its record says what it did."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.config.compose import load_run
from harness.records.evaluations import EVIDENCE_COLUMNS
from tests import forked
from tests.cheats.cheats import FOLDER_VARIABLE
from tests.conftest import TINY_GPT2
from tests.harness.outcomes import read_outcome


class Judged(NamedTuple):
    """The record of a judged trial."""

    status: str
    losses: list[str]
    manifest: dict[str, Any]
    folder: Path


def run_judged(folder: Path, class_path: str, *, retries: int = 0) -> Judged:
    run = load_run([
        *TINY_GPT2, "optimizer=any", f"optimizer.class_path={class_path}", f"records={folder}", "judge=process",
        "checkpoint_seconds=0", "machine=here",
    ])  # fmt: skip
    environment = os.environ | {FOLDER_VARIABLE: str(folder)}
    for _ in range(1 + retries):
        process = forked.run("tests.judged_trial", "retry", env=environment, input=run.model_dump_json())
        assert process.returncode == 0, process.stderr
    record = next(folder.rglob("trial_1"))
    manifest = json.loads((record / "manifest.json").read_text())
    rows = read_outcome(record).rows if (record / "eval_measurements.csv").exists() else []
    return Judged(manifest["status"], [row["validation/loss"] for row in rows], manifest, record)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return run_judged(tmp_path_factory.mktemp("honest"), "tests.cheats.cheats.Honest")
