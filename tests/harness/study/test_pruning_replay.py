"""Replay: its accounting on studies that are written down, and AlgoPerf's records where they are at hand."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from harness.errors import UserError
from harness.scoring.load_records import Records, load_records
from harness.scoring.targets import Target, Targets, read_targets
from harness.study.pruning_replay import make_curves, replay, replay_study
from harness.study.pruning_rules import Futility
from tests.harness import algoperf
from tests.harness.folders import algoperf_trial, pacemark_trial
from tests.harness.study.test_pruning_rules import curve
from tests.processes import call

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

ROOT = Path(__file__).parents[3]
LM = Targets(("lm",), (), {"lm": Target("loss", "min", 2.0)})


def test_what_is_known_is_what_has_ended() -> None:
    fast, slow, never = curve([1, 0]), curve([1, 1, 1, 0]), curve([1] * 6)
    # One after the other: the second ends where the first met the target, the third as well.
    assert replay_study("exact", [fast, slow, never]) == [2, 2, 2]
    assert replay_study("exact", [slow, fast, never]) == [4, 2, 2]
    assert replay_study("exact", [never, slow, fast]) == [6, 4, 2]
    # All at once: at second 2 the first ends, and the others learn it at their evaluation of the same second.
    assert replay_study("exact", [never, slow, fast], parallel=3) == [2, 2, 2]
    # Two at a time: `fast` begins when `slow` ends at second 4, which `never` learns there.
    assert replay_study("exact", [never, slow, fast], parallel=2) == [4, 4, 2]
    assert replay_study("none", [never, slow, fast], parallel=2) == [6, 4, 2]


def test_a_trial_that_went_on_past_its_target_is_a_sibling_when_it_ends() -> None:
    goes_on, never = curve([1, 0, -1, -1, -1]), curve([1] * 8)
    assert replay_study("exact", [goes_on, never], parallel=2) == [5, 5]
    assert replay_study("exact", [goes_on, never]) == [5, 2]


def test_compute_scores_and_cells_are_accounted(tmp_path: Path) -> None:
    for study in (0, 1):
        algoperf_trial(tmp_path, [3, 1, 1], submission="a", study=study)
        algoperf_trial(tmp_path, [3] * 6, submission="a", study=study, trial=2)
        algoperf_trial(tmp_path, [3, 3, 3, 1], submission="b", study=study)
    records = load_records([tmp_path], LM)
    done = replay(records, "exact")
    assert (done.stopped, done.trials) == (2, 6)
    assert done.seconds_share == done.steps_share == pytest.approx((3 + 2 + 4) / (3 + 6 + 4))
    assert done.error == done.steps_error == done.ranks_changed == done.flipped == 0
    assert done.scores["score"].tolist() == pytest.approx([1, 2 / 3])
    only_b = replay(records, "exact", stop=["b"])
    assert only_b.seconds_share == 1 and only_b.trials == 2
    # A rule that stops everything at once flips both cells; nobody then solves the workload.
    harsh = replay(records, "futility", rule=Futility(1e-9, 0.0, 1, 1))
    assert harsh.flipped == harsh.lost == len(harsh.cells) == 1 and harsh.error == pytest.approx(2 / 3)
    assert harsh.cells["submission"].tolist() == ["b"]  # a's first evaluation is at half its way, its second at its end


def test_only_other_submissions_that_may_be_looked_at_are(tmp_path: Path) -> None:
    for study in (0, 1):
        algoperf_trial(tmp_path, [3, 3, 3, 1], submission="a", study=study)
        algoperf_trial(tmp_path, [2.1, 2.1, 2.1, 1], submission="b", study=study)
    records = load_records([tmp_path], LM)
    harsh = Futility(1e-9, 0.0, 1, 1)
    assert replay(records, "futility", rule=harsh).stopped == 4
    assert replay(records, "futility", rule=harsh, look_at=["a"]).stopped == 2
    assert replay(records, "futility", rule=harsh, stop=["a"], look_at=["a"]).stopped == 0
    with pytest.raises(UserError, match="c: no such submission"):
        replay(records, "exact", stop=["c"])


def test_the_budget_of_our_records_is_in_steps(tmp_path: Path) -> None:
    pacemark_trial(tmp_path, [3, 3], config={"workload": {"max_steps": 400}})
    algoperf_trial(tmp_path / "theirs", [3, 3, 3, 3], submission="z", workload="mri")
    both = Targets(("lm", "mri"), (), {name: Target("loss", "min", 2.0) for name in ("lm", "mri")})
    curves = make_curves(load_records([tmp_path], both))
    assert [c.progress.tolist() for c in curves.values()] == [[0.25, 0.5], [0.25, 0.5, 0.75, 1.0]]


def test_the_script_prints_a_line_for_each_setting(tmp_path: Path) -> None:
    algoperf_trial(tmp_path / "r", [3, 1])
    (tmp_path / "t.json").write_text(
        '{"base_workloads": ["lm"], "workloads": {"lm": {"target_metric_name": "loss", "validation_target_value": 2}}}'
    )
    arguments = [tmp_path / "r", "--targets", tmp_path / "t.json"]
    done = call("replay", *arguments, "--margins", "2", "1", "--parallel", "1", "2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:8]] == ["exact"] * 2 + ["futility"] * 4
    bad = call("replay", *arguments, "--parallel", "0")
    assert bad.returncode == 2 and "--parallel must be at least 1" in bad.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Records:
    archive = algoperf.ARCHIVE / "v05_external.tar.xz"
    if not archive.exists():
        pytest.skip("AlgoPerf's records are not here (ALGOPERF_V05 names their folder)")
    folder = tmp_path_factory.mktemp("algoperf")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return load_records([folder], read_targets(algoperf.ARCHIVE / "targets_v05.json"), trust_clock=True)


@pytest.mark.parametrize("parallel", [1, 5])
def test_exact_leaves_the_published_records_scores_as_they_are(published: Records, parallel: int) -> None:
    done = replay(published, "exact", parallel=parallel)
    assert done.error == done.steps_error == done.ranks_changed == len(done.cells) == 0
    assert done.stopped > 1000 and 0.8 < done.seconds_share < 0.95


def test_futility_on_the_published_records_is_what_its_page_says(published: Records) -> None:
    done = replay(published, "futility")
    assert done.error < 0.01 and done.lost == done.ranks_changed == 0
    assert 0.6 < done.seconds_share < 0.65
    assert np.isfinite(done.scores["score"]).all()
