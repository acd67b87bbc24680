"""What a user sees who compares records that do not compare, by mistake or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UserError
from scripts.compare import main as compare
from scripts.leaderboard import main as leaderboard
from tests.harness.review.forging import Trial, honest, of, write


def in_bf16(trials: list[Trial]) -> list[Trial]:
    for trial in of(trials, "muon"):
        trial.set_identity(precision="bf16")
    return trials


def arguments(root: Path) -> list[str]:
    return ["muon", "adamw", "--records", str(root), "--ruleset", "external"]


def test_two_precisions_compare_only_if_that_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, in_bf16(honest()))
    with pytest.raises(UserError, match=r"precision .*\"bf16\": 15 of muon; \"fp32\": 15 of adamw.*--mix precision"):
        compare(arguments(root))
    assert compare([*arguments(root), "--mix", "precision"]) == 0
    printed = capsys.readouterr().out
    assert "gpt2: warning: precision is not the same in all records" in printed and "muon is faster" in printed


def test_machines_of_others_are_no_obstacle_in_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = honest()
    for trial in of(trials, "muon"):
        assert trial.manifest is not None
        trial.manifest["machine"] |= {"device": "cuda", "gpu": "a GPU", "gpu_count": 1}
        trial.manifest["packages"]["torch"] = "2.13.0+cu126"
    assert compare(arguments(write(tmp_path, trials))) == 0
    assert "muon is faster" in capsys.readouterr().out


def test_a_submission_of_which_nothing_is_left_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = honest()
    for trial in of(trials, "muon"):
        trial.set_workload(max_steps=4800)
    with pytest.raises(UserError, match=r"muon: every trial of it was refused; .*audit\.py"):
        compare(arguments(write(tmp_path, trials)))
    printed = capsys.readouterr().out
    assert "max_steps=4800, and ruleset external gives 1600" in printed and "and 7 more" in printed


def test_a_board_lists_what_is_refused(tmp_path: Path) -> None:
    trials = honest()
    for trial in trials[:4]:
        trial.set_identity(precision="bf16")
    root = write(tmp_path / "records", trials)
    assert leaderboard([str(root), "--out", str(tmp_path / "board")]) == 0
    text = (tmp_path / "board" / "LEADERBOARD.md").read_text()
    assert "4 trials are missing, unfinished or refused" in text and "4 invalid" in text
    assert text.count('refused: precision="bf16", and the other records have') == 4
    page = (tmp_path / "board" / "site" / "index.html").read_text()
    assert "remarks on reading the records" in page


def test_a_board_of_some_submissions_is_not_stopped_by_the_others(tmp_path: Path) -> None:
    root = write(tmp_path / "records", in_bf16(honest()))
    with pytest.raises(UserError, match="--mix precision"):
        leaderboard([str(root), "--out", str(tmp_path / "board")])
    assert leaderboard([str(root), "--out", str(tmp_path / "board"), "--submissions", "muon"]) == 0
    assert leaderboard([str(root), "--out", str(tmp_path / "board"), "--mix", "precision"]) == 0
    assert "taken as --mix precision says" in (tmp_path / "board" / "LEADERBOARD.md").read_text()
