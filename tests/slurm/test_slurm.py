"""A study through a real SLURM, whose jobs are warned, cancelled, put back into the queue, preempted and killed.

Skipped where SLURM is not installed or does not start. PACEMARK_TEST_SLURM_INTERRUPTIONS: how many (default: 5).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.records.lease import current_holder
from harness.study import executors, ledger, slurm
from harness.study.ledger import PlannedTrial
from harness.trial.trial import run_trial
from tests import processes
from tests.conftest import TINY_GPT2
from tests.harness.outcomes import read_outcomes
from tests.slurm.cluster import CORES, Cluster, missing

INTERRUPTIONS = int(os.environ.get("PACEMARK_TEST_SLURM_INTERRUPTIONS", "5"))
KINDS = ("warned", "cancelled", "put back", "preempted", "killed")
STUDY = [
    *TINY_GPT2, "optimizer=any", "optimizer.class_path=tests.harness.seams.Held",
    "optimizer.search_space={hyperparameters: {lr: {log: [1e-3, 1e-1]}}}", "machine=here",
    "ruleset=external", "ruleset.studies=1", "ruleset.trials=2", "ruleset.retries=0", "judge=none",
    "workload.max_steps=80", "workload.eval_every=4", "checkpoint_seconds=0",
]  # fmt: skip
SLURM = ["executor=slurm", "executor.options={cluster: slurm}", "executor.minutes=60", "executor.workers=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster())
        except RuntimeError as error:
            pytest.skip(f"SLURM does not start here: {error}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


def interrupt(cluster: Cluster, kind: str, job: str, trials: list[PlannedTrial]) -> bool:
    """Take a running job from its node, or kill a worker that runs a trial. Whether there was one."""
    if kind == "warned":
        # As before the end of its time: submitit puts it back into the queue.
        cluster.call("scancel", "--signal=USR2", job)
    elif kind == "cancelled":
        cluster.call("scancel", job)
    elif kind == "put back":
        cluster.call("scontrol", "requeue", job)
    elif kind == "killed":
        holders = [holder for trial in trials if (holder := current_holder(trial.path.folder)) is not None]
        if not holders:
            return False
        os.kill(holders[0].pid, signal.SIGKILL)
    else:
        # It takes the whole node, so every job is preempted.
        cluster.call("sbatch", "--partition=urgent", f"--cpus-per-task={CORES}", "--output=/dev/null", "--wrap=true")
    return True


def disturb(cluster: Cluster, trials: list[PlannedTrial], is_over: Callable[[], bool]) -> list[str]:
    """Interrupt running jobs at random moments, at their start or later; what was done, in order."""
    moments = random.Random(0)
    done: list[str] = []
    while len(done) < INTERRUPTIONS and not is_over():
        time.sleep(moments.uniform(0, 6))
        kind = KINDS[len(done) % len(KINDS)]
        # Ours, and not the one that preempts them.
        running = sorted(job for job, state in cluster.list_jobs().items() if state == "RUNNING")
        if running:
            # The job can end this moment.
            with contextlib.suppress(subprocess.SubprocessError, ProcessLookupError):
                done += [kind] if interrupt(cluster, kind, moments.choice(running), trials) else []
    return done


@pytest.mark.timeout(60 + 40 * INTERRUPTIONS)
def test_jobs_that_are_interrupted_at_random_end_in_the_same_bits(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "QUEUE_POLL_SECONDS", 0.5)
    monkeypatch.setattr(slurm, "JOB_POLL_SECONDS", 0.2)
    release = tmp_path / "release"
    monkeypatch.setenv("PACEMARK_TEST_RELEASE", str(release))
    trials = ledger.plan([load_run([*STUDY, *SLURM, f"records={tmp_path / 'disturbed'}"])], "unused")
    reported: list[str] = []
    errors: list[BaseException] = []

    def is_over() -> bool:
        return all(ledger.read_state(trial).is_over for trial in trials)

    def restart_until_over() -> None:
        """The same command again, where all jobs were cancelled."""
        try:
            while not is_over():
                executors.execute(trials, reported.append)
        except BaseException as error:
            errors.append(error)

    command = threading.Thread(target=restart_until_over)
    command.start()
    done = disturb(cluster, trials, lambda: not command.is_alive())
    release.touch()
    while command.is_alive() and cluster.list_jobs():
        time.sleep(0.2)
    processes.join(command)
    assert not errors, errors
    assert done == [KINDS[i % len(KINDS)] for i in range(INTERRUPTIONS)]
    check(trials, reported, tmp_path)
    # Nothing of submitit's or of SLURM's own comes between the lines of the command.
    assert "".join(capfd.readouterr()) == ""


def check(trials: list[PlannedTrial], reported: list[str], folder: Path) -> None:
    """Every trial ended once, as without interruptions; and the command said what became of its jobs."""
    for planned in ledger.plan([load_run([*STUDY, f"records={folder / 'undisturbed'}"])], "unused"):
        run_trial(planned.run)
    assert read_outcomes(folder / "disturbed") == read_outcomes(folder / "undisturbed")
    for trial in trials:
        content = json.loads(trial.path.manifest.read_text())
        assert content["status"] == "exhausted" and not content.get("failures")
        assert sorted(path.name for path in trial.path.folder.iterdir()) == ["eval_measurements.csv", "manifest.json"]
    text = "\n".join(reported)
    for words in (
        "was cancelled; ",
        "was put back into the queue; ",
        "ended without a result (its log: ",
        "takes its place",
    ):
        assert words in text, text
