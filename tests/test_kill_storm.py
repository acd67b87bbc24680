"""A study whose processes are killed at random moments: half of the kills fall while a process starts, half while its
trial trains. It ends with every trial once, and with the bits of a study that nobody disturbs.

PACEMARK_TEST_KILLS: how many kills, a multiple of four (default: 8). `pytest -s` prints what was killed when.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.records.kills import forget_kills
from harness.records.lease import current_holder
from harness.study import ledger
from harness.study.ledger import PlannedTrial
from harness.study.trial_process import TrialProcess
from harness.study.worker import Worker
from harness.trial.trial import run_trial
from tests import forked, processes
from tests.conftest import TINY_GPT2
from tests.harness import forked_run
from tests.harness.outcomes import read_outcomes

KILLS = int(os.environ.get("PACEMARK_TEST_KILLS", "8"))
STUDY = [
    *TINY_GPT2, "optimizer=any", "optimizer.class_path=tests.harness.seams.Held",
    "optimizer.search_space={hyperparameters: {lr: {log: [1e-3, 1e-1]}}}", "machine=here", "judge=none",
    "ruleset=external", "ruleset.studies=2", "ruleset.trials=2", "ruleset.retries=0",
    # Each kill in mid-training falls a few steps after a new checkpoint; the end must not come before the last kill.
    f"workload.max_steps={40 + 12 * KILLS}", "workload.eval_every=4", "checkpoint_seconds=0",
]  # fmt: skip


class Victim:
    """What is killed again and again: a worker, or the process of a worker's trial."""

    def __init__(self, trials: list[PlannedTrial]) -> None:
        self.trials = trials
        self.began = 0.0
        """When its present process was started."""

    def start(self) -> None:
        """Wait for a process that was not killed yet, or start it."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill it."""
        raise NotImplementedError

    def holder_pid(self) -> int:
        """Of the worker that runs the trial."""
        raise NotImplementedError

    def is_training(self) -> bool:
        """Whether the trial has a checkpoint of this process."""
        return self._has_newer(lambda trial: trial.path.checkpoint)

    def has_record(self) -> bool:
        """Whether this process has written into the trial's record."""
        return self._has_newer(lambda trial: trial.path.manifest)

    def _has_newer(self, file: Callable[[PlannedTrial], Path]) -> bool:
        for trial in self.trials:
            holder = current_holder(trial.path.folder)
            if holder is not None and holder.pid == self.holder_pid():
                path = file(trial)
                return path.exists() and path.stat().st_mtime > self.began
        return False


class KilledWorker(Victim):
    """A command, run again after each kill. Its trial dies with it."""

    def __init__(self, trials: list[PlannedTrial], records: Path) -> None:
        super().__init__(trials)
        self.command = [forked_run.__name__, *STUDY, f"records={records}"]
        self.process: forked.ForkedProcess | None = None

    def start(self) -> None:
        """As Victim."""
        self.began = time.time()
        self.process = forked.ForkedProcess(*self.command)

    def kill(self) -> None:
        """As Victim."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL

    def holder_pid(self) -> int:
        """As Victim."""
        assert self.process is not None
        return self.process.pid


class KilledTrial(Victim):
    """The process of a trial, which its worker starts again. The worker runs in a thread."""

    def __init__(self, trials: list[PlannedTrial]) -> None:
        super().__init__(trials)
        self.killed: TrialProcess | None = None
        self.thread: threading.Thread | None = None
        self.errors: list[BaseException] = []

    def run(self) -> None:
        """Work until nothing is left. A trial that was left after too many kills is taken up again, as by a further
        command."""
        try:
            while not all(ledger.read_state(trial).is_over for trial in self.trials):
                for trial in self.trials:
                    forget_kills(trial.path)
                self.worker = Worker(self.trials)
                self.worker.work()
        except BaseException as error:
            self.errors.append(error)

    def start(self) -> None:
        """As Victim."""
        if self.thread is None:
            self.worker = Worker(self.trials)
            self.thread = threading.Thread(target=self.run)
            self.thread.start()
        processes.wait_until(self._has_new_process, self.thread.is_alive)
        self.began = time.time()

    def _has_new_process(self) -> bool:
        return self.worker._process is not None and self.worker._process is not self.killed

    def kill(self) -> None:
        """As Victim."""
        self.killed = self.worker._process
        if self.killed is not None:
            self.killed.kill()

    def holder_pid(self) -> int:
        """As Victim."""
        return os.getpid()


def kill_at_random(victim: Victim, seed: int, number: int, killed: Counter[str]) -> None:
    """Kill it so often while it starts, and as often while its trial trains."""
    moments = random.Random(seed)
    start_seconds = 0.5
    left = {"start": number, "training": number}
    while any(left.values()):
        victim.start()
        aim = moments.choice([kind for kind in left if left[kind]])
        if aim == "start":
            time.sleep(moments.uniform(0, start_seconds))
        else:
            processes.wait_until(victim.has_record)
            # As long as a start takes on this machine now.
            start_seconds = time.time() - victim.began
            processes.wait_until(victim.is_training)
            time.sleep(moments.uniform(0, 0.3))
        # It can have come further than was aimed at; what it was at counts.
        was = "training" if victim.is_training() else "between" if victim.has_record() else "start"
        victim.kill()
        killed[f"{type(victim).__name__}, {was}"] += 1
        if left.get(was):
            left[was] -= 1


@pytest.fixture
def forked_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialProcess, "_start", staticmethod(forked.start_trial))


@pytest.mark.usefixtures("forked_trials")
@pytest.mark.timeout(120 + 10 * KILLS)
def test_processes_that_are_killed_at_random_cost_nothing_but_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"
    monkeypatch.setenv("PACEMARK_TEST_RELEASE", str(release))
    records = tmp_path / "killed"
    trials = ledger.plan([load_run([*STUDY, f"records={records}"])], "unused")
    worker, trial = KilledWorker(trials, records), KilledTrial(trials)
    killed: Counter[str] = Counter()
    errors: list[BaseException] = []

    def storm(victim: Victim, seed: int) -> None:
        try:
            kill_at_random(victim, seed, KILLS // 4, killed)
        except BaseException as error:
            errors.append(error)

    began = time.monotonic()
    killers = [threading.Thread(target=storm, args=(victim, seed)) for seed, victim in enumerate((worker, trial))]
    for killer in killers:
        killer.start()
    for killer in killers:
        killer.join()
    print(f"\n{sum(killed.values())} kills in {time.monotonic() - began:.0f} s: {dict(sorted(killed.items()))}")
    release.touch()
    worker.start()
    assert worker.process is not None and trial.thread is not None
    worker.process.communicate()
    processes.join(trial.thread)
    assert not errors and not trial.errors, (errors, trial.errors)
    assert sum(killed[kind] for kind in killed if kind.endswith("start")) >= KILLS // 2
    assert sum(killed[kind] for kind in killed if kind.endswith("training")) >= KILLS // 2
    for planned in ledger.plan([load_run([*STUDY, f"records={tmp_path / 'undisturbed'}"])], "unused"):
        run_trial(planned.run)
    assert read_outcomes(records) == read_outcomes(tmp_path / "undisturbed")
    for planned in trials:
        content = json.loads(planned.path.manifest.read_text())
        assert content["status"] == "exhausted" and not content.get("failures")
        files = ["eval_measurements.csv", "manifest.json", "sources.json"]
        assert sorted(path.name for path in planned.path.folder.iterdir()) in (files, files[:2])
