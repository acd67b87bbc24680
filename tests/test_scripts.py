"""The scripts about studies, as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.errors import run_script
from harness.records.lease import Lease
from harness.study import ledger
from harness.study.progress import REFRESH_SECONDS
from harness.trial.trial import run_trial
from scripts import status
from tests.conftest import TINY_GPT2

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True)


def test_status_tells_what_is_planned_running_and_finished_and_changes_nothing(tmp_path: Path) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd", "ruleset=external", "ruleset.studies=1", "ruleset.trials=3",
                "machine=here", f"records={tmp_path}"])  # fmt: skip
    entries = ledger.plan([run], "unused")
    run_trial(entries[0].run)
    entries[1].path.folder.mkdir(parents=True)
    held = Lease.acquire(entries[1].path.folder, executor="slurm")
    assert held is not None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    done = script("status.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "1/3" in printed and "1 exhausted" in printed and "1 running" in printed and "1 planned" in printed
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith(entries[1].name)]
    assert "0/12" in row and "slurm" in row and entries[2].name not in printed
    assert "1 of 3 trials over (1 exhausted), 1 running; about" in printed
    assert entries[2].name in script("status.py", str(tmp_path), "--every").stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    held.release()


def test_status_of_no_folder_is_an_error(tmp_path: Path) -> None:
    done = script("status.py", str(tmp_path / "nothing"))
    assert done.returncode == 2 and "give a folder of records" in done.stderr


def test_watching_waits_for_the_folder_and_ends_with_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    def press_ctrl_c(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", press_ctrl_c)
    folder = tmp_path / "nothing"
    assert run_script(status.main, ["--watch", str(folder)]) == 130
    assert pauses == [REFRESH_SECONDS] * 3
    assert capsys.readouterr().out.splitlines() == [f"{folder} is not there yet; waiting for it (Ctrl-C ends)"]
    assert run_script(status.main, ["--watch", "0", str(folder)]) == 2
    assert "--watch 0: give the seconds between two looks, above 0" in capsys.readouterr().err


def test_a_search_space_is_shown_with_its_points() -> None:
    done = script("search_space.py", "adamw", "--study", "3", "--trials", "4", "optimizer.hyperparameters.lr=0.5")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["hyperparameters.lr", "log", "0.003,", "0.03"] in lines
    rows = [line for line in lines if line and line[0].isdecimal()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    column = next(line for line in lines if line and line[0] == "trial").index("lr")
    assert {row[column + 1] for row in rows} == {"0.5"}  # betas take two words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nadamm"], "did you mean `nadamw`"), (["any", "optimizer.class_path=torch.optim.Adam"], "search_space")],
)
def test_a_space_that_is_not_there_is_an_error(arguments: list[str], message: str) -> None:
    done = script("search_space.py", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_conformance_prints_a_table_and_what_to_do() -> None:
    done = script("conformance.py", "lion", "sgd", "optimizer.hyperparameters.lr=1e-12")
    table = {words[0]: words[1:] for words in (line.split() for line in done.stdout.splitlines())}
    assert done.returncode == 1 and table["lion"] == ["failed"] * 2 + ["ok"] * 7, done.stdout
    assert "lion, trains: its loss after" in done.stdout and "the recipe's lr?" in done.stdout
