"""Pruning of trials that run, tiny; and how records that were pruned are read."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.board.files import format_files
from harness.errors import UserError
from harness.records.packing import pack
from harness.scoring.leaderboard import score
from harness.scoring.load_records import load_records
from harness.scoring.targets import Target, Targets
from harness.scoring.timings import Timings
from harness.study.timing_run import time_records
from harness.trial.record import Record, Status
from tests.harness.folders import pacemark_trial

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

Trial = Callable[..., Record]
EASY = "workload.target=5.5"
STUCK = ["optimizer.hyperparameters.lr=1e-30", "label=study"]


def in_no_time(record: Record) -> Record:
    """What is left to decide is steps: no test may depend on seconds."""
    with record.path.evaluations.open() as file:
        rows = [row | {"score": 0.0, "accumulated_submission_time": 0.0} for row in csv.DictReader(file)]
    with record.path.evaluations.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return record


def test_exact_ends_a_trial_that_a_sibling_has_beaten(trial: Trial) -> None:
    sibling = in_no_time(trial(EASY, "label=study", "pruning=exact", "trial=1"))
    assert sibling.status is Status.REACHED
    steps = sibling.manifest.final.steps_to_target
    assert steps < 12
    stuck = trial(EASY, *STUCK, "pruning=exact", "trial=2", "checkpoint_seconds=0")
    assert stuck.status is Status.PRUNED
    assert stuck.rows[-1]["global_step"] == steps and stuck.rows[-1]["test/loss"] == ""
    final = json.loads(stuck.path.manifest.read_text())["final"]
    assert final["stop_reason"].startswith(f"pruning=exact: trial 1 met the target after {steps} steps")
    assert final["steps_to_target"] is None
    assert not stuck.path.checkpoint.exists()
    assert stuck.manifest.identity["pruning"] == "exact"
    # It is over: the same command leaves it alone.
    assert trial(EASY, *STUCK, "pruning=exact", "trial=2").rows == []


def test_without_pruning_the_trial_goes_on_and_its_identity_does_not_name_it(trial: Trial) -> None:
    in_no_time(trial(EASY, "label=study"))
    stuck = trial(EASY, *STUCK, "trial=2")
    assert stuck.status is Status.EXHAUSTED
    assert "pruning" not in stuck.manifest.identity


def test_a_trial_that_met_its_target_is_not_stopped(trial: Trial) -> None:
    in_no_time(trial(EASY, "label=study"))
    same = trial(EASY, "label=study", "trial=2", "run_to_end=true", "pruning=exact")
    assert same.status is Status.REACHED and same.rows[-1]["global_step"] == 12


def test_only_finished_trials_of_the_same_study_are_siblings(trial: Trial) -> None:
    sibling = in_no_time(trial(EASY, "label=study"))
    shutil.copytree(sibling.folder.parents[1], sibling.folder.parents[2] / "study_7")
    sibling.path.manifest.write_text(sibling.path.manifest.read_text().replace('"reached"', '"running"'))
    assert trial(EASY, *STUCK, "trial=2", "pruning=exact").status is Status.EXHAUSTED


@pytest.mark.parametrize(("submission", "packed"), [("lion", False), ("adamw", False), ("lion", True), ("adamw", True)])
def test_futility_compares_with_other_submissions_but_not_with_its_own(
    trial: Trial, submission: str, packed: bool
) -> None:
    target = "workload.target=5.25"
    for optimizer, lr in (("lion", 0.002), ("sgd", 0.02)):
        name = f"label={optimizer}-x"
        record = in_no_time(trial(target, f"optimizer.hyperparameters.lr={lr}", name, optimizer=optimizer))
        assert record.status is Status.REACHED and len(record.rows) > 1
        for study in range(1, 6):
            shutil.copytree(record.folder.parents[1], record.folder.parents[2] / f"study_{study}")
        if packed:
            pack(record.path.submission_folder)
    stuck = trial(target, *STUCK, "pruning=futility", "run_to_end=true", optimizer=submission)
    if submission == "lion":  # what is left are six trials of one submission
        assert stuck.status is Status.EXHAUSTED
    else:
        assert stuck.status is Status.PRUNED and stuck.rows[-1]["global_step"] == 6
        assert "50% of the way to the deadline" in stuck.manifest.final.stop_reason
        assert "the 12 successful trials of 2 other submissions" in stuck.manifest.final.stop_reason


# ---- records that were pruned ------------------------------------------------------------------------------------

LM = Targets(("lm",), (), {"lm": Target("loss", "min", 2.0)})


def pruned_study(root: Path) -> Path:
    for study in range(3):
        pacemark_trial(root, [3, 1], submission="a", study=study, ruleset="many")
        pacemark_trial(root, [3, 3], submission="a", study=study, trial=2, status="pruned", ruleset="many")
        pacemark_trial(root, [3, 3, 3], submission="b", study=study, status="pruned", ruleset="many")
    return root


def test_a_pruned_trial_is_a_miss_of_the_length_it_had(tmp_path: Path) -> None:
    records = load_records([pruned_study(tmp_path)])
    assert records.trials["status"].tolist() == ["reached", "pruned"] * 3 + ["pruned"] * 3
    assert records.trials.loc[records.trials["status"] == "pruned", "limit_steps"].tolist() == [200] * 3 + [300] * 3
    board = score(records)
    assert board.scores.set_index("submission")["pruned"].to_dict() == {"a": 3, "b": 3}
    assert board.scores.set_index("submission")["score"].to_dict() == {"a": 1, "b": 0}
    assert any("6 trials were stopped early" in note for note in board.notes)
    assert "3 reached, 3 pruned" in format_files(board, "t", [])["LEADERBOARD.md"]
    pacemark_trial(tmp_path / "none", [3, 1])
    assert "pruned" not in score(load_records([tmp_path / "none"])).scores


def test_another_target_than_the_one_it_was_pruned_under_is_said(tmp_path: Path) -> None:
    pacemark_trial(tmp_path, [3, 2.5], status="pruned")
    assert not load_records([tmp_path], LM).problems
    easier = load_records([tmp_path], Targets(("lm",), (), {"lm": Target("loss", "min", 2.2)}))
    assert "pruned under the target 2.0; under 2.2" in easier.problems[0].message
    met = load_records([tmp_path], Targets(("lm",), (), {"lm": Target("loss", "min", 2.7)}))
    assert met.trials["status"].tolist() == ["reached"]


def test_timing_refuses_pruned_studies(tmp_path: Path) -> None:
    records = load_records([pruned_study(tmp_path)])
    index = pd.MultiIndex.from_tuples([("a", "lm"), ("b", "lm")], names=["submission", "workload"])
    costs = pd.DataFrame({"seconds_per_step": 1.0, "error": 0.0, "one_off": 0.0}, index=index)
    with pytest.raises(UserError, match=r"6 trials of a, b were pruned.*pruning=none"):
        score(records, timings=Timings("m", 3, costs))
    with pytest.raises(UserError, match="were pruned"):
        time_records(records, [tmp_path])
    assert np.isfinite(score(records).scores["score"]).all()
