"""The scripts about studies, as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.command_line import run_script
from harness.config.compose import load_run
from harness.records.lease import Lease
from harness.study import ledger
from harness.study.progress import REFRESH_SECONDS
from harness.trial.trial import run_trial
from scripts import status
from tests.conftest import TINY_GPT2
from tests.harness.folders import pacemark_trial
from tests.processes import call

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_status_tells_what_is_planned_running_and_finished_and_changes_nothing(tmp_path: Path) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd", "ruleset=external", "ruleset.studies=1", "ruleset.trials=3",
                "machine=here", f"records={tmp_path}"])  # fmt: skip
    entries = ledger.plan([run], "unused")
    run_trial(entries[0].run)
    entries[1].path.folder.mkdir(parents=True)
    held = Lease.acquire(entries[1].path.folder, executor="slurm")
    assert held is not None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    done = call("status", str(tmp_path))
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "1/3" in printed and "1 exhausted" in printed and "1 running" in printed and "1 planned" in printed
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith(entries[1].name)]
    assert "0/12" in row and "slurm" in row and entries[2].name not in printed
    assert "1 of 3 trials over (1 exhausted), 1 running; about" in printed
    assert entries[2].name in call("status", str(tmp_path), "--every").stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    held.release()


def test_status_of_no_folder_is_an_error(tmp_path: Path) -> None:
    done = call("status", str(tmp_path / "nothing"))
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
    done = call("search_space", "adamw", "--study", "3", "--trials", "4", "optimizer.hyperparameters.lr=0.5")
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
    done = call("search_space", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_conformance_prints_a_table_and_what_to_do() -> None:
    done = call("conformance", "lion", "sgd", "optimizer.hyperparameters.lr=1e-12")
    table = {words[0]: words[1:] for words in (line.split() for line in done.stdout.splitlines())}
    assert done.returncode == 1 and table["lion"] == ["failed"] * 2 + ["ok"] * 7, done.stdout
    assert "lion, trains: its loss after" in done.stdout and "the recipe's lr?" in done.stdout


def test_records_are_packed_shown_and_unpacked(tmp_path: Path) -> None:
    for submission in ("a", "b", "c"):
        for study in (0, 1):
            pacemark_trial(tmp_path, [3.0, 2.5, 1.75], submission=submission, study=study, status="reached",
                      final={"steps_to_target": 300}, hyperparameters={"lr": 0.25, "note": "\x1b[31m"})  # fmt: skip
    machine = tmp_path / "mini/quick/machine"
    (machine / "c/study_0/lm_pytorch/trial_1/checkpoint.pt").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = call("records", "pack", str(tmp_path))
    assert done.returncode == 1 and done.stdout == "2 submissions packed\n"
    assert "error: " in done.stderr and "c/study_0/lm_pytorch/trial_1/checkpoint.pt" in done.stderr
    assert {path.name for path in machine.iterdir()} == {"a.tar.xz", "b.tar.xz", "c"}
    shown = call("records", "show", str(machine / "a.tar.xz"))
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2 * 5
    first = shown.stdout.splitlines()[:5]
    assert first[0].startswith("study_0/lm_pytorch/trial_1: reached, 300 steps to target, validation/loss 2, workload")
    assert first[1] == "    hyperparameters lr 0.25, note \\x1b[31m" and "3 evaluations, sha256 " in first[2]
    assert first[3] == "    first global_step 100, accumulated_submission_time 10, validation/loss 3"
    assert first[4] == "    last  global_step 300, accumulated_submission_time 30, validation/loss 1.75"
    done = call("records", "unpack", str(tmp_path))
    assert done.returncode == 0 and done.stdout == "2 submissions unpacked\n", done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_archive_is_shown_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    pacemark_trial(tmp_path, [3.0, 1.0], status="reached")
    call("records", "pack", str(tmp_path))
    (archive,) = tmp_path.rglob("*.tar.xz")
    archive.write_bytes(archive.read_bytes()[:-30])
    shown = call("records", "show", str(archive))
    assert shown.returncode == 0 and shown.stdout.startswith("PROBLEM ") and "damaged" in shown.stdout
    done = call("records", "unpack", str(tmp_path))
    assert done.returncode == 1 and "0 submissions unpacked" in done.stdout and "stays as it is" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "."], "holds no folder study_<seed>"),
        (["pack", "nothing"], "is not a folder"),
        (["unpack", "."], "holds no archive <label>.tar.xz"),
        (["show", "nothing"], "is no file"),
    ],
)
def test_records_that_are_not_there_are_an_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    command, name = arguments
    done = call("records", command, str(tmp_path / name))
    assert done.returncode == 2 and message in done.stderr


def test_git_shows_what_changed_in_an_archive(tmp_path: Path) -> None:
    """With the lines of docs/sending_records.md."""
    root = SCRIPTS.parent
    page = (root / "docs" / "sending_records.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("git config diff.pacemark.textconv")]
    assert line == 'git config diff.pacemark.textconv "python scripts/records.py show"'

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("init", "-q")
    git("config", "diff.pacemark.textconv", f"{sys.executable} {SCRIPTS / 'records.py'} show")
    (tmp_path / ".gitattributes").write_text((root / ".gitattributes").read_text())
    folder = pacemark_trial(tmp_path / "records", [3.0, 1.0], status="reached")
    call("records", "pack", str(tmp_path / "records"))
    git("add", "-A")
    git("commit", "-qm", "first")
    call("records", "unpack", str(tmp_path / "records"))
    csv = folder / "eval_measurements.csv"
    csv.write_text(csv.read_text().replace(",1.0,64", ",1.5,64"))
    call("records", "pack", str(tmp_path / "records"))
    lines = [line for line in git("diff").splitlines() if line[0] in "+-" and line[1] not in "+-"]
    assert len(lines) == 4 and "validation/loss 1.5" in lines[-1] and "sha256" in lines[0]
