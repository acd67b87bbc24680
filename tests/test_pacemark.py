"""The installed package: its command, its public names, and results as DataFrames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pacemark
from harness.errors import UserError
from pacemark import command
from tests import processes

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "external" / "records"


def test_every_command_has_a_module_with_a_main() -> None:
    for name in command.COMMANDS:
        path = ROOT / "scripts" / f"{name.replace('-', '_')}.py"
        assert "def main(arguments: list[str]) -> int:" in path.read_text(), name


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "pacemark run workload=gpt2"),
        (["--version"], 0, f"pacemark {pacemark.__version__}"),
        (["compar"], 2, "error: compar: no such command; did you mean `compare`?"),
        (["--config-dir"], 2, "error: --config-dir: a folder is missing"),
        (["completion", "fish"], 2, "bash and zsh are there"),
        (["run", "workload=gpt2", "optimzer=lion"], 2, "optimzer: unknown key; did you mean `optimizer`?"),
    ],
)
def test_the_command(
    arguments: list[str],
    status: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["pacemark"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    assert command.main(arguments) == status
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err


def test_help_and_completion_bring_neither_torch_nor_pandas() -> None:
    code = "import sys; from pacemark.command import main; main(sys.argv[1:]); "
    code += "assert not {'torch', 'pandas', 'scipy'} & set(sys.modules)"
    for arguments in (["--help"], ["completion", "bash"]):
        processes.run([sys.executable, "-c", code, *arguments], check=True)


def complete(line: str, script: str) -> list[str]:
    """What bash offers after `line`."""
    code = f"{script}\nCOMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; _pacemark; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_keys_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete("pacemark le", script) == ["leaderboard"]
    assert complete("pacemark run workl", script)[0] == "workload="
    # What bash takes for a word begins after the `=`.
    assert complete("pacemark run optimizer=mars_l", script) == ["mars_lion", "mars_lion_exact"]
    assert complete("pacemark run device=c", script) == ["cpu", "cuda"]


def test_public_names_are_there_and_others_say_so() -> None:
    for name in pacemark.__all__:
        assert getattr(pacemark, name) is not None
    with pytest.raises(AttributeError, match="its public names are in __all__"):
        pacemark.nothing  # noqa: B018


def test_a_notebook_of_ten_lines_has_curves_and_hyperparameters() -> None:
    trials = pacemark.load_records(str(RECORDS), ruleset="external")
    best = trials[trials["status"] == "reached"].sort_values("steps").groupby(["submission", "workload"]).first()
    assert best.loc[("muon", "gpt2"), "hp.lr"] > 0 and best.loc[("muon", "gpt2"), "schedule.horizon_fraction"] <= 1
    curves = pacemark.load_curves(RECORDS)
    of_best = curves.merge(best.reset_index()[["submission", "workload", "study", "trial"]])
    median = of_best[of_best["workload"] == "gpt2"].pivot_table("validation/loss", "step", "submission", "median")
    board = pacemark.score([RECORDS], timing=ROOT / "results" / "external" / "timing.csv")
    assert median["muon"].min() < 1.3951 and board.scores["submission"].iloc[0] == "muon"
    # The rows are those of the files: as many as evaluations, and the step at which the target was met.
    row = best.loc[("muon", "gpt2")]
    curve = curves[(curves["submission"] == "muon") & (curves["workload"] == "gpt2")]
    curve = curve[(curve["study"] == row["study"]) & (curve["trial"] == row["trial"])]
    assert curve[curve["validation/loss"] <= row["target"]]["step"].min() == row["steps"]


def test_submissions_are_listed_by_pattern() -> None:
    assert "lion" in pacemark.list_submissions("*lion*") and "adamw" not in pacemark.list_submissions("*lion*")
    assert "any" not in pacemark.list_submissions()


def test_no_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    for records in ([], tmp_path / "nothing"):
        with pytest.raises(UserError, match="folder"):
            pacemark.load_records(records)
