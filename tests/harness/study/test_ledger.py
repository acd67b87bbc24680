from __future__ import annotations

import gc
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.compose import load_run
from harness.config.schema import Run
from harness.errors import UserError
from harness.records.lease import Lease
from harness.records.manifest import Manifest
from harness.records.packing import pack
from harness.study import ledger
from harness.study.ledger import PlannedTrial
from harness.study.status import seconds_left, survey_records
from harness.study.worker import acquire_lease
from harness.trial import trial as trial_module
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


def test_two_commands_that_plan_at_once_lose_no_trial_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = ledger.exclusive_access

    @contextmanager
    def plan_another_first(folder: Path) -> Iterator[None]:
        """The other command comes between the look of this one and its writing."""
        monkeypatch.undo()
        planned(study(tmp_path, "ruleset.trials=1", "seed=7"))
        with access(folder):
            yield

    planned(study(tmp_path, "ruleset.trials=1"))
    monkeypatch.setattr(ledger, "exclusive_access", plan_another_first)
    planned(study(tmp_path, "ruleset.trials=1", "seed=3"))
    assert {entry.path.study for entry in ledger.list_all_trials(tmp_path)[0]} >= {0, 3, 7}


def test_planning_waits_for_who_plans_or_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.records.packing._WAIT_SECONDS", 0.2)
    (entry, *_) = planned(study(tmp_path))
    before = contents(tmp_path)
    with ledger.exclusive_access(entry.path.submission_folder):
        # What is planned already needs no writing.
        planned(study(tmp_path))
        with pytest.raises(UserError, match="held by a process that packs, unpacks or plans; wait for it"):
            planned(study(tmp_path, "seed=3"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.search_space.hyperparameters.lr={log: [1e-4, 1e-3]}", r"search_space.*log: \[0.003, 0.03\] there"),
        ("run_to_end=true", "run_to_end: False there, True now"),
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
    changed = [study(tmp_path, f"label={label}", "run_to_end=true") for label in ("a", "b", "c")]
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


# ---- studies that are packed -------------------------------------------------------------------------------------


def finished_study(records: Path) -> list[PlannedTrial]:
    trials = planned(study(records))
    for trial in trials:
        write(trial, "reached", identity=trial.run.identity(), config=trial.run.model_dump(mode="json"))
    return trials


def test_a_packed_study_is_listed_as_its_folder_was_and_stays_packed(tmp_path: Path) -> None:
    trials = finished_study(tmp_path)
    run_trial(load_run([*TINY_GPT2, "optimizer=sgd", f"records={tmp_path}", "machine=here"]))
    before = [(trial.trial.name, trial.state.name) for trial in survey_records(tmp_path)[0]]
    for label in ("adamw", "sgd"):
        folder = next(path for path in trials[0].path.machine_folder.parents[1].glob(f"*/*/{label}"))
        pack(folder)
    packed = contents(tmp_path)
    surveyed, messages = survey_records(tmp_path)
    assert [(trial.trial.name, trial.state.name) for trial in surveyed] == before
    assert len(before) == 7 and not messages
    assert contents(tmp_path) == packed and len(packed) == 2


def test_a_damaged_archive_is_named_and_the_rest_is_listed(tmp_path: Path) -> None:
    archive = pack(finished_study(tmp_path)[0].path.submission_folder)
    archive.write_bytes(archive.read_bytes()[:-40])
    listed, messages = ledger.list_all_trials(tmp_path)
    assert len(listed) == 6 and len(messages) == 1 and str(archive) in messages[0] and "damaged" in messages[0]


def test_a_packed_study_is_unpacked_before_it_is_planned_and_nothing_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = finished_study(tmp_path)
    before, folder = contents(tmp_path), trials[0].path.submission_folder
    archive = pack(folder)
    again = planned(study(tmp_path))
    assert capsys.readouterr().out == f"unpacked {archive}; scripts/records.py pack packs it again\n"
    assert contents(tmp_path) == before
    assert {ledger.read_state(trial).name for trial in again} == {"reached"}
    # A study that grows, and one of another configuration.
    lines: list[str] = []
    pack(folder)
    grown = ledger.plan([study(tmp_path, "ruleset.trials=4")], "unused", lines.append)
    assert [ledger.read_state(trial).name for trial in grown].count("planned") == 2 and len(lines) == 1
    with pytest.raises(UserError, match="the trial has not begun"):
        pack(folder)


def test_a_packed_study_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trials = planned(study(tmp_path, "label=mine"))
    for trial in trials:
        write(trial, "reached")
    pack(trials[0].path.submission_folder)
    with pytest.raises(UserError, match=r"run_to_end: False there, True now.*label=NAME.*overwrite=true"):
        planned(study(tmp_path, "label=mine", "run_to_end=true"))


def test_a_damaged_archive_stops_a_command_before_anything_is_written(tmp_path: Path) -> None:
    archive = pack(finished_study(tmp_path)[0].path.submission_folder)
    archive.write_bytes(archive.read_bytes()[:-40])
    before = contents(tmp_path)
    with pytest.raises(UserError, match="git checkout"):
        planned(study(tmp_path))
    with pytest.raises(UserError, match="git checkout"):
        run_trial(study(tmp_path))
    assert contents(tmp_path) == before


def test_a_trial_that_lies_packed_is_not_run_again(tmp_path: Path) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd", f"records={tmp_path}"])
    first, _ = run_trial(run)
    pack(first.path.submission_folder)
    second, ran = run_trial(run)
    assert not ran and second.manifest == first.manifest and second.folder.is_dir()
    pack(first.path.submission_folder)
    _, ran = run_trial(run.model_copy(update={"overwrite": True}))
    assert ran and first.folder.is_dir() and len(list(tmp_path.rglob("*.tar.xz"))) == 0


def test_a_study_that_is_packed_while_its_trial_waits_is_unpacked_by_the_worker(tmp_path: Path) -> None:
    trials = finished_study(tmp_path)
    write(trials[0], "failed")  # it can be tried again
    before = contents(tmp_path)
    pack(trials[0].path.submission_folder)
    lease = acquire_lease(trials[0])
    assert lease is not None
    lease.release()
    assert contents(tmp_path) == before and ledger.read_state(trials[0]).name == "to retry"


def test_a_study_that_is_packed_while_its_trial_loads_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its record and the lease of its folder."""
    run = load_run([*TINY_GPT2, "optimizer=sgd", f"records={tmp_path}"])
    first, _ = run_trial(run)
    content = first.path.manifest.read_text().replace('"exhausted"', '"failed"')
    first.path.manifest.write_text(content)
    load = trial_module.load_workload

    def pack_and_load(*arguments: Any) -> Any:
        pack(first.path.submission_folder)
        return load(*arguments)

    monkeypatch.setattr(trial_module, "load_workload", pack_and_load)
    second, ran = run_trial(run, retry=True)
    assert ran and second.manifest is not None and len(second.manifest.failures) == 1


def test_a_list_decodes_one_manifest_of_each_study_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundred thousand trials that would take most of the time and of the memory."""
    whole: list[object] = []
    parse = Manifest.model_validate_json
    monkeypatch.setattr(Manifest, "model_validate_json", lambda content: whole.append(content) or parse(content))
    entries = planned(study(tmp_path))
    config = json.loads(entries[0].path.plan.read_text())["config"]
    for entry in entries:
        write(entry, "reached", config=config)
    for is_planned in (True, False):
        if not is_planned:
            entries[0].path.plan.unlink()
        whole.clear()
        surveyed, messages = survey_records(tmp_path)
        assert [trial.state.name for trial in surveyed] == ["reached"] * 6 and not messages
        assert len(whole) == (0 if is_planned else 1)
        assert gc.isenabled()


def test_a_damaged_manifest_among_others_is_one_message(tmp_path: Path) -> None:
    entries = planned(study(tmp_path))
    config = json.loads(entries[0].path.plan.read_text())["config"]
    entries[0].path.plan.unlink()
    for entry in entries:
        write(entry, "reached", config=config)
    first, *_, last = sorted(entry.path.manifest for entry in entries)
    for damaged in (first, last):
        damaged.write_text("{")
    surveyed, messages = survey_records(tmp_path)
    assert len(surveyed) == 4 and [state.state.name for state in surveyed] == ["reached"] * 4
    assert len(messages) == 2 and all("cannot be read" in message for message in messages)
