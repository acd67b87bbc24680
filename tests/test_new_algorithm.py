"""docs/new_algorithm.md, run as it is written in a copy of the tree, with the override that it documents."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "new_algorithm.md"
COPIED = ("configs", "harness", "results/untuned", "scripts", "submissions", "tests", "workloads", "run.py",
          "pyproject.toml")  # fmt: skip


MATRICES = "## Rules for matrices\n"


def sections() -> tuple[str, str]:
    """The walk, and the section on matrices, which stands by itself."""
    walk, separator, rest = PAGE.read_text().partition(MATRICES)
    assert separator
    matrices, heading, end = rest.partition("\n## ")
    return walk + heading + end, matrices


def run_blocks(text: str, tree: Path, variables: dict[str, str]) -> str:
    """Write the files of a section into the tree and run its commands, in their order; what they print."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(tree)} | variables
    # The many processes compile the copy once.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    printed = ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = block.partition("\n")[0]
        if language == "sh":
            done = subprocess.run(["bash", "-ec", block], cwd=tree, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
        elif first.startswith("# "):
            file = tree / first.removeprefix("# ")
            assert not file.exists(), f"{first} is in the tree already"
            file.write_text(block)
    return printed


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in COPIED:
        source, copy = ROOT / name, tmp_path / name
        if source.is_dir():
            # Of the records those of adamw, with which the page compares: timing takes every submission that it finds.
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "[!a]*.tar.xz"))
        else:
            shutil.copy(source, copy)
    return tmp_path


def shorten_the_budget(tree: Path) -> None:
    """A ruleset with half a percent of the budget, and the records of adamw made with it."""
    ruleset = tree / "configs" / "ruleset" / "quick.yaml"
    content = ruleset.read_text()
    assert "budget_factor: 1.0" in content
    ruleset.write_text(content.replace("budget_factor: 1.0", "budget_factor: 0.005"))
    records = tree / "results" / "untuned" / "records"
    shutil.rmtree(records)
    # One process for the three trials: the page starts as many itself.
    code = f"""
from harness.config.compose import load_run
from harness.trial.trial import run_trial
for seed in range(3):
    arguments = ["workload=gpt2", "optimizer=adamw", f"seed={{seed}}", "run_to_end=true", "records={records}"]
    run_trial(load_run(arguments))
"""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, check=True, capture_output=True)


def test_the_walk_from_paper_to_leaderboard(tree: Path) -> None:
    short = {"ROUNDS": "3"}
    assert "`export ROUNDS=3`" in PAGE.read_text() and "`budget_factor: 0.005`" in PAGE.read_text()
    shorten_the_budget(tree)
    printed = run_blocks(sections()[0], tree, short)
    assert re.search(r"^qhadam( +ok){9} *$", printed, re.MULTILINE)  # conformance
    assert "6 passed" in printed or re.search(r"^\.{6} ", printed, re.MULTILINE)  # parity
    assert len(list((tree / "results/records/mini/quick").glob("*/qhadam/study_*/gpt2_pytorch/trial_1"))) == 3
    verdicts = re.findall(r"^  gpt2 +qhadam missed \(0 of 3 studies\), adamw ", printed, re.MULTILINE)
    assert len(verdicts) == 3  # in steps, and again with the seconds
    scores = pd.read_csv(tree / "board" / "scores.csv").set_index("submission")
    assert scores["score"].to_dict() == {"adamw": 0, "qhadam": 0}
    assert (tree / "board" / "site" / "index.html").exists()


def test_the_rule_for_matrices(tree: Path) -> None:
    printed = run_blocks(sections()[1], tree, {})
    assert re.search(r"^orthogonal_sgdm( +ok){9} *$", printed, re.MULTILINE)  # conformance
    assert "6 passed" in printed or re.search(r"^\.{6} ", printed, re.MULTILINE)  # parity
