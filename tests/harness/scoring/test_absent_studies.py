"""A study that a submission lacks counts as one that missed the target: good studies alone make no good submission."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.scoring.leaderboard import Leaderboard, score
from harness.scoring.load_records import load_records
from harness.scoring.timings import Timings
from tests.harness.folders import pacemark_trial

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

MET = [3.0, 1.5]
"""Values of the metric, whose target is at most 2."""


def make_study(root: Path, submission: str, study: int, seconds: float, ruleset: str = "external") -> None:
    """Five trials that meet the target after twice so many seconds."""
    for trial in range(1, 6):
        parts = {"submission": submission, "study": study, "trial": trial, "ruleset": ruleset}
        pacemark_trial(root, MET, seconds, **parts)  # type: ignore[arg-type]


def make_board(root: Path, ruleset: str = "external", **options: object) -> Leaderboard:
    return score(load_records([root]), **options)  # type: ignore[arg-type]


@pytest.fixture
def lucky(tmp_path: Path) -> Path:
    """`whole` has three studies of 100, 200 and 210 seconds, `lucky` has the first alone. The interpolated crossing is
    at 5 / 6 of these: two thirds of the way between the two evaluations."""
    for study, seconds in enumerate((50.0, 100.0, 105.0)):
        make_study(tmp_path, "whole", study, seconds)
    make_study(tmp_path, "lucky", 0, 50.0)
    return tmp_path


def scores_of(board: Leaderboard) -> dict[str, float]:
    return dict(zip(board.scores["submission"], board.scores["score"], strict=True))


def test_one_good_study_of_three_is_no_median(lucky: Path) -> None:
    board = make_board(lucky)
    assert scores_of(board) == {"whole": 1.0, "lucky": 0.0}
    cells = board.times.set_index("submission")
    assert cells.loc["lucky", ["status", "studies", "studies_reached"]].tolist() == ["missed", 3, 1]
    assert cells.loc["whole", "seconds"] == pytest.approx(200 * 5 / 6)
    assert any(note == "Absent studies, which count as not reached: lucky on lm 2." for note in board.notes)
    # The interval too takes it for a miss; trials that do not exist are not listed.
    times = board.uncertainty.times.set_index("submission")
    assert not np.isfinite(times.loc["lucky", "high"])
    assert board.scores.set_index("submission").loc["lucky", "missing"] == 0
    assert len(board.records.trials) == 20


def test_two_of_three_studies_that_reach_the_target_make_a_median(lucky: Path) -> None:
    make_study(lucky, "lucky", 7, 60.0)
    board = make_board(lucky)
    assert board.times.set_index("submission").loc["lucky", "seconds"] == pytest.approx(100)
    assert scores_of(board)["lucky"] == 1.0


def test_with_a_timing_run_it_is_the_same(lucky: Path) -> None:
    rows = [
        {"machine": "m", "workload": "lm", "submission": name, "round": number, "steps": 10, "seconds": 1.0,
         "build_seconds": 0.0, "compile_seconds": 0.0}
        for name in ("whole", "lucky") for number in (1, 2, 3)
    ]  # fmt: skip
    board = make_board(lucky, timings=Timings.from_rows(pd.DataFrame(rows)))
    assert scores_of(board) == {"whole": 1.0, "lucky": 0.0}


def test_algoperfs_own_rule_and_a_comparison_leave_absent_studies_out(lucky: Path) -> None:
    for options in ({"mode": "algoperf"}, {"count_absent_studies": False}):
        assert scores_of(make_board(lucky, **options)) == pytest.approx({"lucky": 1.0, "whole": 2 / 3}, abs=1e-2)


def test_nobody_is_asked_for_more_studies_than_the_ruleset_or_than_anyone_has(tmp_path: Path) -> None:
    """Seeds of ruleset=quick are studies that a user adds; one study each is a board of single studies."""
    for name, ruleset, studies in (("quick", "quick", 3), ("external", "external", 1), ("five", "external", 5)):
        root = tmp_path / name
        for study in range(studies):
            make_study(root, "whole", study, 100.0, ruleset)
        for study in range(3 if name == "five" else 1):
            make_study(root, "lucky", study, 50.0, ruleset)
        board = make_board(root)
        assert scores_of(board)["lucky"] == 1.0, name
        assert not any("Absent studies" in note for note in board.notes)
