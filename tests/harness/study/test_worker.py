"""Workers on real trials, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import log
from harness.config.compose import load_run
from harness.errors import UserError
from harness.records.kills import KILL_LIMIT, count_kills, last_cause
from harness.records.lease import Lease
from harness.study import executors, ledger
from harness.study.ledger import PlannedTrial
from harness.study.progress import describe_end
from harness.study.trial_process import Slot, TrialProcess
from harness.study.worker import Worker, acquire_lease
from harness.trial.trial import run_trial
from tests import forked, processes
from tests.conftest import TINY_GPT2
from tests.harness.outcomes import read_outcome

SEAM = ["optimizer=any", "optimizer.search_space={hyperparameters: {lr: {log: [1e-3, 1e-1]}}}"]


@pytest.fixture
def forked_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are forked from a process that has loaded torch: for all tests but those of how a trial starts."""
    monkeypatch.setattr(TrialProcess, "_start", staticmethod(forked.start_trial))


def study(records: Path, *arguments: str) -> list[PlannedTrial]:
    external = ["ruleset=external", "ruleset.studies=1", "ruleset.trials=1", "machine=here"]
    return ledger.plan([load_run([*TINY_GPT2, *external, f"records={records}", *arguments])], "unused")


def manifest(entry: PlannedTrial) -> dict[str, Any]:
    return dict(json.loads(entry.path.manifest.read_text()))


@pytest.fixture
def log_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(log.VARIABLE, "DEBUG")
    log.configure()
    yield
    monkeypatch.undo()
    log.configure()


@pytest.mark.usefixtures("forked_trials")
def test_workers_share_the_trials_and_run_each_once(tmp_path: Path) -> None:
    entries = study(tmp_path, "optimizer=sgd", "ruleset.trials=2")
    workers = [Worker(entries), Worker(entries)]
    threads = [threading.Thread(target=worker.work) for worker in workers]
    for thread in threads:
        thread.start()
    processes.join(*threads)
    for entry in entries:
        assert manifest(entry)["status"] == "exhausted" and manifest(entry)["preemption_count"] == 0
        assert sorted(path.name for path in entry.path.folder.iterdir()) == ["eval_measurements.csv", "manifest.json"]


@pytest.mark.usefixtures("forked_trials")
def test_a_trial_that_crashes_is_retried_and_then_left(tmp_path: Path) -> None:
    entries = study(tmp_path, *SEAM, "optimizer.class_path=tests.harness.seams.Broken", "ruleset.retries=1")
    Worker(entries).work()
    content = manifest(entries[0])
    assert content["status"] == "failed" and "the third step is wrong" in content["final"]["traceback"]
    assert len(content["failures"]) == 1 and "the third step is wrong" in content["failures"][0]


@pytest.mark.usefixtures("forked_trials")
def test_a_trial_whose_process_dies_is_retried_from_its_checkpoint_and_then_left(
    tmp_path: Path, log_everything: None
) -> None:
    entries = study(
        tmp_path,
        *SEAM,
        "optimizer.class_path=tests.harness.seams.Deadly",
        "ruleset.retries=2",
        "checkpoint_seconds=0",
        "judge=none",
    )
    Worker(entries).work()
    content = manifest(entries[0])
    assert content["status"] == "failed" and "SIGABRT" in content["final"]["traceback"]
    # Records of its log are no part of what it wrote last.
    assert content["final"]["traceback"] == "the process of the trial ended by signal SIGABRT"
    assert len(content["failures"]) == 2
    assert content["preemption_count"] == 2


@pytest.mark.usefixtures("forked_trials")
def test_the_log_of_a_trial_comes_to_its_parent_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = []
    for level in ("WARNING", "DEBUG"):
        monkeypatch.setenv(log.VARIABLE, level)
        log.configure()
        (entry,) = study(tmp_path / level, "optimizer=sgd")
        Worker([entry]).work()
        outcomes.append(read_outcome(entry.path.folder))
        printed = capsys.readouterr().err
        for line in (
            f"INFO harness.study.worker: {entry.name}: taken, with lease ",
            " (it was planned)\n",
            f"DEBUG harness.trial.trial: {entry.name}: step 3 of 12: validation/loss ",
            f"INFO harness.trial.trial: {entry.name}: ended as exhausted",
            " ended with status 0 after ",
        ):
            assert (line in printed) == (level == "DEBUG"), printed
    assert outcomes[0] == outcomes[1]
    monkeypatch.undo()
    log.configure()


@pytest.mark.usefixtures("forked_trials")
def test_divergence_is_a_result_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = study(tmp_path, "optimizer=sgd", "optimizer.hyperparameters.lr=1e30", "optimizer.clip_norm=null")
    worker = Worker(entries)
    # Nothing is waited for after the last trial.
    monkeypatch.delattr("harness.study.worker.POLL_SECONDS")
    worker.work()
    assert manifest(entries[0])["status"] == "diverged" and "failures" not in manifest(entries[0])


@pytest.mark.usefixtures("forked_trials")
def test_what_the_user_must_mend_stops_the_worker_and_spoils_nothing(tmp_path: Path, log_everything: None) -> None:
    entries = study(tmp_path, "optimizer=sgd", "data=/nonexistent")
    with pytest.raises(UserError) as caught:
        Worker(entries).work()
    (message,) = caught.value.messages
    assert message.startswith("data=/nonexistent")
    assert ledger.read_state(entries[0]).name == "planned"


@pytest.mark.usefixtures("forked_trials")
def test_a_full_disk_is_said_and_the_same_trial_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    entries = study(tmp_path, "optimizer=sgd")
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "acquire", full)
        with pytest.raises(UserError, match=r"records=.*No space left.*the same command continues"):
            Worker(entries).work()
    Worker(entries).work()
    assert manifest(entries[0])["status"] == "exhausted"


@pytest.mark.usefixtures("forked_trials")
def test_a_stopped_worker_leaves_a_trial_that_another_continues(tmp_path: Path) -> None:
    entries = study(tmp_path, "optimizer=sgd", "workload.max_steps=1000000", "checkpoint_seconds=0")
    worker = Worker(entries)
    thread = threading.Thread(target=worker.work)
    thread.start()
    checkpoint = entries[0].path.checkpoint
    processes.wait_until(checkpoint.exists, thread.is_alive)
    worker.stop()
    processes.join(thread)
    assert manifest(entries[0])["status"] == "stopped"
    assert ledger.read_state(entries[0]).name == "interrupted"
    assert entries[0].path.checkpoint.exists()


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_process_that_is_stopped_while_it_starts_is_no_crash(tmp_path: Path, seconds: float) -> None:
    (entry,) = study(tmp_path, "optimizer=sgd", "workload.max_steps=1000000")
    lease = acquire_lease(entry)
    assert lease is not None
    process = TrialProcess(entry.run, lease, Slot())
    time.sleep(seconds)
    process.interrupt()
    assert process.wait() is None
    lease.release()
    assert ledger.read_state(entry).name in ("planned", "interrupted")


@pytest.mark.usefixtures("forked_trials")
def test_a_worker_whose_lease_was_taken_over_kills_its_process_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.records.lease.HEARTBEAT_SECONDS", 0.05)
    entries = study(tmp_path, "optimizer=sgd", "workload.max_steps=1000000", "checkpoint_seconds=0")
    worker = Worker(entries)
    thread = threading.Thread(target=worker.work)
    thread.start()
    rows = entries[0].path.evaluations
    processes.wait_until(rows.exists, thread.is_alive)
    (last,) = entries[0].path.folder.glob(".lease/*")
    other = {"host": "elsewhere", "pid": 1, "started": "1", "executor": "slurm"}
    last.with_name("x").write_text(json.dumps(other))
    last.unlink()
    processes.wait_until(lambda: worker._process is None)
    before = rows.read_bytes()
    worker.stop()
    processes.join(thread)
    assert rows.read_bytes() == before
    assert ledger.read_state(entries[0]).worker.startswith("slurm elsewhere")
    assert not last.exists()


def test_a_trial_dies_with_its_worker(tmp_path: Path) -> None:
    """However the parent ends, its child does not go on writing."""
    entries = study(tmp_path, "optimizer=sgd", "workload.max_steps=100000")
    held = acquire_lease(entries[0])
    assert held is not None
    child = TrialProcess(entries[0].run, held, Slot())
    assert child._process.stdin is not None
    processes.wait_until(entries[0].path.evaluations.exists, processes.is_running(child._process))
    child._process.stdin.close()  # what the system does when the parent is killed
    assert child._process.wait(processes.DEADLINE_SECONDS) == 1
    held.release()


def test_the_environment_of_a_trial_is_its_place(tmp_path: Path) -> None:
    entries = study(tmp_path, *SEAM, "optimizer.class_path=tests.harness.seams.Nosy", "ruleset.retries=0")
    core = min(os.sched_getaffinity(0))
    Worker(entries, Slot(cores=(core,), gpu="7")).work()
    assert manifest(entries[0])["status"] == "failed"
    assert f"cores {{{core}}} gpu 7 threads 1" in manifest(entries[0])["final"]["traceback"]


def run_until_it_hangs(entry: PlannedTrial, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the trial in a worker, which takes no progress for a hang as soon as the trial hangs, and not before."""
    monkeypatch.setenv("PACEMARK_TEST_HANG", str(marker))
    worker = Worker([entry])
    thread = threading.Thread(target=worker.work)
    thread.start()
    processes.wait_until(marker.exists, thread.is_alive)
    assert worker._process is not None
    worker._process._stall_seconds = 0.0
    processes.join(thread)


HANGING = [*SEAM, "optimizer.class_path=tests.harness.seams.Hanging", "checkpoint_seconds=0"]


@pytest.mark.usefixtures("forked_trials")
def test_a_process_that_hangs_is_stopped_and_its_trial_is_tried_again_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Children are asked for their stacks.
    monkeypatch.setenv(forked.TRAINEE_VARIABLE, "started")
    (entry,) = study(tmp_path / "records", *HANGING, "ruleset.retries=0")
    run_until_it_hangs(entry, tmp_path / "marker", monkeypatch)
    state = ledger.read_state(entry)
    assert state.name == "failed" and str(state.final.stop_reason).startswith("no progress for ")
    assert describe_end(state).startswith("failed: no progress for ")
    # Where it hung.
    assert "seams.py" in str(state.final.traceback) and "in step" in str(state.final.traceback)
    # With a retry it goes on there.
    (again,) = study(tmp_path / "records", *HANGING, "ruleset.retries=1")
    Worker([again]).work()
    content = manifest(again)
    assert content["status"] == "exhausted" and content["failures"] == [state.final.traceback]
    (undisturbed,) = study(tmp_path / "undisturbed", *HANGING)
    run_trial(undisturbed.run)
    assert read_outcome(again.path.folder) == read_outcome(undisturbed.path.folder)


@pytest.mark.usefixtures("forked_trials")
def test_a_process_that_hangs_cannot_keep_its_worker_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.study.trial_process._INTERRUPT_SECONDS", 0.5)
    monkeypatch.setenv("PACEMARK_TEST_HANG", str(tmp_path / "marker"))
    (entry,) = study(tmp_path / "records", *HANGING)
    worker = Worker([entry])
    thread = threading.Thread(target=worker.work)
    thread.start()
    processes.wait_until((tmp_path / "marker").exists, thread.is_alive)
    worker.stop()
    processes.join(thread)
    assert ledger.read_state(entry).name == "interrupted" and entry.path.checkpoint.exists()


@pytest.mark.usefixtures("forked_trials")
def test_a_process_that_writes_another_record_than_its_own_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a GPU of another kind gives the folder of the machine another name."""
    (entry,) = study(tmp_path, "optimizer=sgd")
    (elsewhere,) = study(tmp_path, "optimizer=sgd", "label=elsewhere")
    run = entry.run
    monkeypatch.setattr(PlannedTrial, "run", property(lambda _: run.model_copy(update={"label": "elsewhere"})))
    with pytest.raises(UserError, match=r"has no record although its process ended well.*machine=NAME"):
        Worker([entry]).work()
    assert elsewhere.path.manifest.exists()


def kill_child(worker: Worker, number: int, name: str | None = None) -> None:
    """Send a signal to the process that the worker runs, to that of the trial `name` if it is given."""
    process = worker._process
    if process is not None and name in (None, process._name):
        process._process.send_signal(number)


def run_while(worker: Worker, disturb: Callable[[], None]) -> None:
    """Let the worker work to its end, and call `disturb` again and again meanwhile."""
    thread = threading.Thread(target=worker.work)
    thread.start()
    deadline = time.monotonic() + processes.DEADLINE_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        disturb()
        time.sleep(0.01)
    processes.join(thread)


@pytest.mark.usefixtures("forked_trials")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_that_is_killed_from_outside_goes_on_to_the_same_bits_and_uses_up_no_retry(
    tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["optimizer=adamw", "ruleset.retries=0", "checkpoint_seconds=0"]
    (entry,) = study(tmp_path / "records", *arguments)
    worker = Worker([entry])
    killed: set[int] = set()

    def disturb() -> None:
        # Once at every checkpoint, so that more kills fall than the limit allows without one.
        if entry.path.checkpoint.exists() and (inode := entry.path.checkpoint.stat().st_mtime_ns) not in killed:
            killed.add(inode)
            kill_child(worker, number)

    run_while(worker, disturb)
    content = manifest(entry)
    assert content["status"] == "exhausted", content["final"]
    assert not content.get("failures") and content["preemption_count"] >= 1
    assert sorted(path.name for path in entry.path.folder.iterdir()) == ["eval_measurements.csv", "manifest.json"]
    (undisturbed,) = study(tmp_path / "undisturbed", *arguments)
    run_trial(undisturbed.run)
    assert read_outcome(entry.path.folder) == read_outcome(undisturbed.path.folder)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_a_trial_that_is_killed_while_its_process_starts_is_started_again(tmp_path: Path, seconds: float) -> None:
    (entry,) = study(tmp_path, "optimizer=sgd", "ruleset.retries=0")
    worker = Worker([entry])
    killed: list[int] = []

    def disturb() -> None:
        if worker._process is not None and not killed:
            time.sleep(seconds)
            killed.append(worker._process._process.pid)
            kill_child(worker, signal.SIGKILL)

    run_while(worker, disturb)
    assert killed and manifest(entry)["status"] == "exhausted" and "failures" not in manifest(entry)


@pytest.mark.usefixtures("forked_trials")
def test_a_trial_that_is_killed_again_and_again_is_left_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = study(tmp_path, "optimizer=sgd", "ruleset.trials=3", "ruleset.retries=0")
    victim = entries[0]
    worker = Worker(entries)
    run_while(worker, lambda: kill_child(worker, signal.SIGKILL, victim.name))
    assert not victim.path.manifest.exists() or manifest(victim)["status"] == "running"
    assert count_kills(victim.path) == KILL_LIMIT
    assert f"{victim.name}: its process was killed by SIGKILL, {KILL_LIMIT} times" in caplog.text
    assert all(manifest(entry)["status"] == "exhausted" for entry in entries[1:])
    # Every worker of the command leaves it, and a new command tries it again.
    Worker([victim]).work()
    assert count_kills(victim.path) == KILL_LIMIT
    executors.execute(entries, print)
    assert manifest(victim)["status"] == "exhausted" and count_kills(victim.path) == 0


@pytest.mark.usefixtures("forked_trials")
@pytest.mark.parametrize("status", [0, 2, 3])
def test_a_submission_that_ends_the_process_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("PACEMARK_TEST_STATUS", str(status))
    path = "optimizer.class_path=tests.harness.seams.Leaving"
    (entry,) = study(tmp_path, *SEAM, path, "ruleset.retries=1", "judge=none")
    Worker([entry]).work()
    content = manifest(entry)
    assert content["status"] == "failed" and len(content["failures"]) == 1
    assert f"ended with status {status}" in content["final"]["traceback"]


@pytest.mark.usefixtures("forked_trials")
@pytest.mark.parametrize(
    ("death", "judge", "cause"),
    [
        ("SIGSEGV", "none", "the process of the trial ended by signal SIGSEGV"),
        ("SIGSEGV", "process", "the process of the submission ended by signal SIGSEGV"),
        ("SIGUSR2", "none", None),
        ("0", "none", "the process of the trial ended with status 0 before the trial was over"),
        ("0", "process", "the process of the submission ended with status 0"),
        ("3", "none", "the process of the trial ended with status 3"),
    ],
)
def test_a_process_that_ends_before_its_trial_has_a_record_ends_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, judge: str, cause: str | None
) -> None:
    deadly = [*SEAM, "optimizer.class_path=tests.harness.deadly.Deadly", f"judge={judge}", "ruleset.retries=0"]
    entries = study(tmp_path / "records", *deadly) + study(tmp_path / "records", "optimizer=sgd", "judge=none")
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    for number in range(KILL_LIMIT):
        (deaths / str(number)).touch()
    monkeypatch.setenv("PACEMARK_TEST_DEATHS", str(deaths))
    monkeypatch.setenv("PACEMARK_TEST_DEATH", death)
    Worker(entries).work()
    assert manifest(entries[1])["status"] == "exhausted"
    if cause is None:
        # Ignored from the beginning: SLURM sends it to all processes of a job.
        assert manifest(entries[0])["status"] == "exhausted"
        return
    assert not entries[0].path.manifest.exists() and not list(deaths.iterdir())
    assert (count_kills(entries[0].path), last_cause(entries[0].path)) == (KILL_LIMIT, cause)
    # The next command tries it again.
    executors.execute(entries, print)
    assert manifest(entries[0])["status"] == "exhausted" and count_kills(entries[0].path) == 0


@pytest.mark.usefixtures("forked_trials")
@pytest.mark.parametrize("number", [signal.SIGXCPU, signal.SIGRTMIN + 5])
def test_any_signal_that_comes_from_outside_is_no_crash(tmp_path: Path, number: int) -> None:
    (entry,) = study(tmp_path, "optimizer=adamw", "ruleset.retries=0", "checkpoint_seconds=0", "judge=none")
    worker = Worker([entry])
    killed: list[int] = []

    def disturb() -> None:
        if entry.path.checkpoint.exists() and not killed:
            killed.append(number)
            kill_child(worker, number)

    run_while(worker, disturb)
    assert killed and manifest(entry)["status"] == "exhausted" and not manifest(entry).get("failures")


@pytest.mark.usefixtures("forked_trials")
def test_an_interrupt_that_is_lost_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.study.trial_process._REPEAT_SECONDS", 0.0)
    marker = tmp_path / "marker"
    monkeypatch.setenv("PACEMARK_TEST_DEAF", str(marker))
    deaf = [*SEAM, "optimizer.class_path=tests.harness.seams.DeafOnce", "judge=none"]
    (entry,) = study(tmp_path / "records", *deaf, "workload.max_steps=1000000", "checkpoint_seconds=0")
    worker = Worker([entry])
    thread = threading.Thread(target=worker.work)
    thread.start()
    # Of the evaluation after the step at which it turns deaf.
    processes.wait_until(
        lambda: entry.path.evaluations.exists() and len(entry.path.evaluations.read_text().splitlines()) > 4
    )
    worker.stop()
    processes.join(thread)
    assert marker.exists() and ledger.read_state(entry).name == "interrupted"
