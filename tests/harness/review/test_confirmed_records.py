"""Records of ruleset=confirmed: its stages are taken for what they are, and mixes of them are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.config.confirmation import FINALIST_SEED, FRESH_SEED, TUNING_SEED
from harness.scoring.leaderboard import score
from harness.scoring.load_records import Records, load_records
from tests.harness.folders import pacemark_trial

pytestmark = pytest.mark.usefixtures("workloads_of_tests")


def make(root: Path, ruleset: str, study: int, trial: int, **parts: object) -> None:
    # Not the same rows twice, which would be a copy.
    seconds = 10.0 + 0.01 * (study % 1000) + trial
    pacemark_trial(root, [3.0, 1.5], seconds, study=study, trial=trial, ruleset=ruleset, **parts)  # type: ignore[arg-type]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """All stages of a submission."""
    for trial in range(1, 11):
        make(tmp_path, "confirmed_tuning", TUNING_SEED, trial)
    for seed in range(FINALIST_SEED, FINALIST_SEED + 3):
        for trial in (2, 5, 7):
            make(tmp_path, "confirmed_finalists", seed, trial)
    for seed in range(FRESH_SEED, FRESH_SEED + 8):
        make(tmp_path, "confirmed", seed, 5)
    return tmp_path


def refusals(records: Records) -> list[str]:
    refused = records.trials[records.trials["status"] == "invalid"]
    return [problem.message for path in refused["path"] for problem in records.problems if problem.path == path]


def studies_problems(records: Records) -> list[str]:
    messages = [problem.message for problem in records.problems]
    return [message for message in messages if any(word in message for word in ("studies", "seeds", "point"))]


STAGES = [("confirmed", 8), ("confirmed_tuning", 10), ("confirmed_finalists", 9)]


@pytest.mark.parametrize(("ruleset", "trials"), STAGES)
def test_every_stage_is_accepted_by_itself(whole: Path, ruleset: str, trials: int) -> None:
    records = load_records([whole], ruleset=ruleset)
    assert len(records.trials) == trials and not refusals(records)
    assert not studies_problems(records)


def test_the_score_is_of_the_fresh_seeds_alone(whole: Path) -> None:
    board = score(load_records([whole], ruleset="confirmed"))
    cell = board.times.iloc[0]
    assert (cell["studies"], cell["studies_reached"]) == (8, 8)
    fresh = [2 * (10 + 0.01 * (seed % 1000) + 5) * 5 / 6 for seed in range(FRESH_SEED, FRESH_SEED + 8)]
    assert min(fresh) < cell["seconds"] < max(fresh)
    assert not [note for note in board.notes if "do not have" in note or "Absent" in note]


@pytest.mark.parametrize(
    ("ruleset", "study", "trial", "message"),
    [
        ("confirmed", TUNING_SEED, 5, "seed of another stage"),
        ("confirmed", FINALIST_SEED, 5, "seed of another stage"),
        ("confirmed", 0, 5, "can have been seen"),
        ("confirmed", 900_500, 5, "targets are measured"),
        ("confirmed", FRESH_SEED + 8, 7, "not at the point of the other trials"),
        ("confirmed", FRESH_SEED + 8, 11, "tries 10"),
        ("confirmed_tuning", FRESH_SEED, 3, "seed of another stage"),
        ("confirmed_tuning", TUNING_SEED, 11, "gives 10"),
        ("confirmed_finalists", TUNING_SEED, 3, "seed of another stage"),
    ],
)
def test_mixes_are_refused(whole: Path, ruleset: str, study: int, trial: int, message: str) -> None:
    before = len(load_records([whole], ruleset=ruleset).trials)
    make(whole, ruleset, study, trial)
    records = load_records([whole], ruleset=ruleset)
    assert len(records.trials) == before + 1
    (refusal,) = refusals(records)
    assert message in refusal


def test_other_rulesets_may_not_have_the_kept_seeds(tmp_path: Path) -> None:
    make(tmp_path, "quick", 0, 1)
    make(tmp_path, "quick", FRESH_SEED, 1)
    (refusal,) = refusals(load_records([tmp_path]))
    assert "are kept for rulesets that confirm" in refusal


def test_seeds_that_do_not_count_up_are_told(whole: Path) -> None:
    (folder,) = whole.glob(f"*/confirmed/*/*/study_{FRESH_SEED}")
    shutil.rmtree(folder)
    board = score(load_records([whole], ruleset="confirmed"))
    assert any(f"must count up from {FRESH_SEED}" in p.message for p in board.records.problems)
