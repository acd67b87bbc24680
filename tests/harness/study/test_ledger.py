from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.compose import load_run
from harness.config.schema import Run
from harness.errors import UserError
from harness.records.lease import Lease
from harness.study import ledger
from harness.study.ledger import PlannedTrial
from harness.study.status import seconds_left, survey_records
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2
from tests.harness.manifests import write_manifest


def study(records: Path, *arguments: str) -> Run:
    external = ["optimizer=adamw", "ruleset=external", "ruleset.studies=2", "ruleset.trials=3", "machine=here"]
    return load_run([*TINY_GPT2, *external, f"records={records}", *arguments])


def planned(run: Run) -> list[PlannedTrial]:
    return ledger.plan([run], "unused")


def names(entries: list[PlannedTrial]) -> set[str]:
    return {entry.name for entry in entries}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(entry: PlannedTrial, status: str, **replaced: object) -> None:
    write_manifest(entry.path.folder, **{"status": status, "final": {}} | replaced)


def test_a_plan_lists_every_trial_of_every_study_before_it_runs(tmp_path: Path) -> None:
    entries = planned(study(tmp_path))
    assert Counter((entry.path.study, entry.path.trial) for entry in entries) == {
        (s, t): 1 for s in (0, 1) for t in (1, 2, 3)
    }
    assert [entry.path.study for entry in entries] == [0, 0, 0, 1, 1, 1]
    listed, problems = ledger.list_all_trials(tmp_path)
    assert names(listed) == names(entries) and not problems
    assert {ledger.read_state(entry).name for entry in listed} == {"planned"}


def test_what_is_read_back_is_the_same_trial(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in planned(study(tmp_path, "optimizer.hyperparameters.lr=0.02"))}
    for entry in ledger.list_all_trials(tmp_path)[0]:
        former = entries[entry.name]
        assert entry.path.folder == former.path.folder
        assert entry.run.identity() == former.run.identity()
        assert entry.run.optimizer.effective_hyperparameters["lr"] == 0.02


def test_a_study_can_grow_and_its_points_stay(tmp_path: Path) -> None:
    before = {entry.name: entry.run.identity() for entry in planned(study(tmp_path))}
    planned(study(tmp_path, "ruleset.trials=5", "ruleset.studies=3"))
    after = {entry.name: entry.run.identity() for entry in ledger.list_all_trials(tmp_path)[0]}
    assert len(after) == 15
    assert {name: after[name] for name in before} == before


@given(asked=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=4))
@settings(max_examples=8)
def test_a_plan_holds_all_that_was_ever_asked_each_once(
    asked: list[tuple[int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = tmp_path_factory.mktemp("records")
    for studies, trials, seed in asked:
        planned(study(records, f"ruleset.studies={studies}", f"ruleset.trials={trials}", f"seed={seed}"))
    expected = {(seed + s, t) for studies, trials, seed in asked for s in range(studies) for t in range(1, trials + 1)}
    assert Counter(
        (entry.path.study, entry.path.trial) for entry in ledger.list_all_trials(records)[0]
    ) == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.search_space.hyperparameters.lr={log: [1e-4, 1e-3]}", r"search_space.*log: \[0.003, 0.03\] there"),
        ("precision=bf16", "precision: fp32 there, bf16 now"),
    ],
)
def test_a_folder_planned_for_another_configuration_is_refused(tmp_path: Path, change: str, message: str) -> None:
    planned(study(tmp_path, "label=mine"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{message}.*label=NAME.*overwrite=true"):
        planned(study(tmp_path, "label=mine", change))
    assert contents(tmp_path) == before
    planned(study(tmp_path, "label=mine", change, "overwrite=true"))


def test_two_bad_folders_are_reported_together_and_nothing_is_planned(tmp_path: Path) -> None:
    for label in ("a", "b"):
        planned(study(tmp_path, f"label={label}"))
    before = contents(tmp_path)
    changed = [study(tmp_path, f"label={label}", "precision=bf16") for label in ("a", "b", "c")]
    with pytest.raises(UserError) as caught:
        ledger.plan(changed, "unused")
    assert len(caught.value.messages) == 2 and contents(tmp_path) == before


def test_states_follow_the_records(tmp_path: Path) -> None:
    entry = planned(study(tmp_path))[0]
    for status, state in [("running", "interrupted"), ("stopped", "interrupted"), ("reached", "reached"),
                          ("diverged", "diverged"), ("pruned", "pruned"), ("failed", "to retry")]:  # fmt: skip
        write(entry, status)
        assert ledger.read_state(entry).name == state
        assert ledger.read_state(entry).is_claimable == (state in ledger.CLAIMABLE)
    write(entry, "failed", failures=["first", "second"])  # ruleset.retries=1
    assert ledger.read_state(entry).name == "failed" and ledger.read_state(entry).is_over
    write(entry, "running")
    held = Lease.acquire(entry.path.folder, executor="slurm")
    assert held is not None
    state = ledger.read_state(entry)
    assert state.name == "running" and state.worker.startswith("slurm ") and str(os.getpid()) in state.worker
    assert not state.is_claimable and not state.is_over


def test_a_process_that_ends_without_a_word_is_a_crash_retried_a_stated_number_of_times(tmp_path: Path) -> None:
    entry = planned(study(tmp_path, "ruleset.retries=1"))[0]
    write(entry, "running")
    ledger.record_crash(entry, "killed")
    assert ledger.read_state(entry).name == "interrupted"
    ledger.record_crash(entry, "killed again")
    state = ledger.read_state(entry)
    assert state.name == "failed" and state.manifest.final.traceback == "killed again"
    assert state.manifest.failures == ["killed"]


def test_a_damaged_manifest_is_said_and_the_others_are_listed(tmp_path: Path) -> None:
    entries = planned(study(tmp_path))
    write(entries[0], "reached")
    (entries[1].path.folder).mkdir(parents=True)
    (entries[1].path.folder / "manifest.json").write_text('{"status": "rea')
    trials, problems = survey_records(tmp_path)
    assert len(trials) == 5
    assert any("cannot be read" in line and "move the folder away" in line for line in problems)


def test_a_damaged_plan_is_said(tmp_path: Path) -> None:
    planned(study(tmp_path))
    (path,) = tmp_path.rglob("plan_*.json")
    path.write_text("{}")
    assert any("remove it" in line for line in ledger.list_all_trials(tmp_path)[1])
    with pytest.raises(UserError, match="remove it, and the same command plans again"):
        planned(study(tmp_path))


def test_trials_that_nobody_planned_are_listed_too(tmp_path: Path) -> None:
    run_trial(load_run([*TINY_GPT2, "optimizer=sgd", f"records={tmp_path}"]))
    trials, problems = survey_records(tmp_path)
    assert not problems
    assert [(trial.trial.name, trial.state.name) for trial in trials] == [
        ("sgd on gpt2, study 0, trial 1", "exhausted")
    ]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        ledger.list_all_trials(tmp_path / "nothing")


def test_overwrite_discards_the_former_study(tmp_path: Path) -> None:
    for entry in planned(study(tmp_path, "ruleset.trials=5")):
        write(entry, "reached")
    planned(study(tmp_path, "overwrite=true"))
    listed, _ = ledger.list_all_trials(tmp_path)
    assert len(listed) == 6 and {ledger.read_state(entry).name for entry in listed} == {"planned"}
    assert not list(tmp_path.rglob("manifest.json"))


def test_overwrite_waits_for_nobody_and_discards_nothing_that_runs(tmp_path: Path) -> None:
    entries = planned(study(tmp_path))
    for entry in entries:
        write(entry, "running")
    held = Lease.acquire(entries[3].path.folder)
    assert held is not None
    before = contents(tmp_path)
    with pytest.raises(UserError, match="written by another process"):
        planned(study(tmp_path, "overwrite=true"))
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match=r"records=.*cannot be written"):
        planned(study(tmp_path))
    tmp_path.chmod(stat.S_IRWXU)


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "records").write_text("")
    with pytest.raises(UserError, match=r"records=.*cannot be written"):
        planned(study(tmp_path / "records"))


def test_time_left_goes_by_trials_of_the_same_kind(tmp_path: Path) -> None:
    entries = planned(study(tmp_path))
    for entry in entries[:2]:
        write(entry, "exhausted", final={"submission_seconds": 80.0, "evaluation_share": 0.2})
    trials, _ = survey_records(tmp_path)
    assert seconds_left(trials) == (pytest.approx(4 * 100.0), 0)
    planned(study(tmp_path, "optimizer=lion"))
    assert seconds_left(survey_records(tmp_path)[0]) == (pytest.approx(10 * 100.0), 0)
    other = load_run(["workload=vit", "optimizer=lion", "machine=here", f"records={tmp_path}", "ruleset=external"])
    planned(other)
    assert seconds_left(survey_records(tmp_path)[0]) == (pytest.approx(10 * 100.0), 15)
