"""The command: lines, a summary, an exit status; and every committed record passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.review.audit import audit
from harness.review.finding import Severity
from pacemark.command import main as pacemark
from scripts.audit import main
from tests.harness.review.forging import COMMITTED, honest, write

RESULTS = Path(__file__).parents[3] / "results"


@pytest.mark.parametrize("folder", sorted(path.name for path in RESULTS.iterdir()))
def test_no_committed_record_raises_an_alarm(folder: str) -> None:
    trials, findings = audit([RESULTS / folder])
    assert trials and not [finding for finding in findings if finding.severity is not Severity.NOTE]


def test_all_committed_records_together_raise_none() -> None:
    trials, findings = audit([RESULTS])
    assert trials >= 789 and not [finding for finding in findings if finding.severity is not Severity.NOTE]


def test_one_line_each_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = honest()
    assert trials[0].manifest is not None
    trials[0].manifest["config_hash"] = "\x1b[31m"
    root = write(tmp_path / "records", trials)
    assert main([str(root), "--json", str(tmp_path / "out" / "findings.json")]) == 1
    first, *_, summary = capsys.readouterr().out.splitlines()
    path = "mini/external/machine/adamw/study_0/gpt2_pytorch/trial_1"
    assert first.startswith(f"refused manifest {path}: config_hash=\\x1b[31m..., and the identity has ")
    assert summary == "30 trials: 1 refused, 0 warning, 2 note"
    written = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert len(written) == 3 and written[0].keys() == {"severity", "kind", "path", "message"}
    assert (written[0]["severity"], written[0]["path"]) == ("refused", path)


def test_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pacemark(["audit", str(COMMITTED / "muon.tar.xz")]) == 0
    assert pacemark(["audit", str(tmp_path / "nothing")]) == 2
    shutil.copytree(write(tmp_path / "a", honest()[:3]), tmp_path / "b")
    # Three of five trials, and each there twice.
    assert pacemark(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "the same trial as mini/external" in capsys.readouterr().out
