"""A study from the command line, by workers that are killed again and again."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.records.layout import EVALUATIONS, MANIFEST, SOURCES
from harness.study import ledger
from harness.trial.trial import run_trial
from tests import forked, processes
from tests.conftest import TINY_GPT2
from tests.harness import forked_run
from tests.harness.outcomes import read_outcomes
from tests.harness.seams import plan_kills

STUDY = [
    *TINY_GPT2, "optimizer=any", "optimizer.class_path=tests.harness.seams.KilledAtRandom",
    "optimizer.search_space={hyperparameters: {lr: {log: [1e-3, 1e-1]}}}", "machine=here",
    "ruleset=external", "ruleset.studies=2", "ruleset.trials=2",
    "workload.max_steps=60", "workload.eval_every=4", "checkpoint_seconds=0",
]  # fmt: skip


def command(records: Path, *arguments: str) -> list[str]:
    return [forked_run.__name__, *STUDY, f"records={records}", *arguments]


# It starts a dozen processes that train, which takes minutes where others use the cores.
@pytest.mark.timeout(400)
def test_killed_workers_end_with_every_trial_once_and_the_same_results(tmp_path: Path) -> None:
    for planned in ledger.plan([load_run([*STUDY, f"records={tmp_path / 'undisturbed'}"])], "unused"):
        run_trial(planned.run)
    expected = read_outcomes(tmp_path / "undisturbed")
    assert len(expected) == 4 and len({str(outcome.hyperparameters) for outcome in expected.values()}) == 4

    killed, environment = tmp_path / "killed", plan_kills(tmp_path / "kills", 3, victim="parent")
    statuses: list[int] = []

    def restart_until_over() -> None:
        """The same command, again after each kill."""
        for _ in range(4):
            done = forked.run(*command(killed), env=environment)
            statuses.append(done.returncode)
            if done.returncode != -signal.SIGKILL:
                break

    workers = [threading.Thread(target=restart_until_over) for _ in range(2)]
    for worker in workers:
        worker.start()
    processes.join(*workers)
    assert sorted(statuses) == [-signal.SIGKILL] * 3 + [0] * 2
    last = forked.run(*command(killed), env=environment)
    assert last.returncode == 0 and "4 trials, 4 of them finished already" in last.stdout
    assert "0 of 2 reached" in last.stdout and "missed" in last.stdout
    assert read_outcomes(killed) == expected
    for folder in killed.rglob("trial_*"):
        assert sorted(path.name for path in folder.iterdir()) == [EVALUATIONS, MANIFEST, SOURCES]
    interrupted = [json.loads(path.read_text())["preemption_count"] for path in killed.rglob("manifest.json")]
    assert sum(interrupted) == 3


def test_an_interrupted_pool_stops_its_trials_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["executor.workers=2", "workload.max_steps=1000000", "workload.eval_every=20"]
    environment = plan_kills(tmp_path / "kills", 0)
    pool = forked.ForkedProcess(*command(tmp_path, *arguments), env=environment)
    # By os.walk: a folder that another process removes meanwhile is no error there.
    checkpoints = lambda: sum("checkpoint.pt" in files for _, _, files in os.walk(tmp_path))  # noqa: E731
    processes.wait_until(lambda: checkpoints() == 2, processes.is_running(pool))
    pool.send_signal(signal.SIGINT)
    _, errors = pool.communicate()
    assert pool.returncode == 130 and "the same command continues" in errors
    monkeypatch.setenv("COLUMNS", "200")
    status = processes.call("status", tmp_path)
    assert status.returncode == 0, status.stderr
    assert "2 interrupted, 2 planned" in " ".join(status.stdout.split())
    assert "0 running" in status.stdout
    assert not list(tmp_path.rglob(".lease*"))
