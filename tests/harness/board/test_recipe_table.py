from __future__ import annotations

from pathlib import Path

import pytest

from harness.board.recipe_table import format_recipes
from harness.scoring.load_records import load_records
from tests.harness.folders import pacemark_trial
from tests.processes import call

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

ROOT = Path(__file__).parents[3]


def test_a_row_says_how_much_of_the_budget_was_needed_or_how_close_it_came(tmp_path: Path) -> None:
    pacemark_trial(
        tmp_path, [4.0, 2.5, 2.2, 2.1], steps=110, submission="short", needs=["selection"]
    )  # overshoots the budget
    pacemark_trial(tmp_path, [4.0, 1.9, 1.8, 1.7], submission="quick")
    pacemark_trial(tmp_path, [4.0, 3.0, 1.9, 1.8], submission="slow")
    pacemark_trial(tmp_path, [4.0, 3.5], submission="gone", status="diverged")
    pacemark_trial(tmp_path, [4.0, 3.0, 2.0, 1.8], submission="slow", workload="other")
    lines = format_recipes(load_records([tmp_path])).splitlines()
    assert lines[0] == "Targets reached: `lm` by 2 of 4, `other` by 1 of 1."
    assert lines[2].startswith("| submission | lm: loss 2 | other: loss 2 |")
    assert lines[4:] == [
        "| `slow` | 300 (75%) | 300 (75%) |",
        "| `quick` | 200 (50%) | not run |",
        "| `gone` | missed, best 3.5 (diverged at step 200) | not run |",
        "| `short` | missed, best 2.1 | not run |",
    ]


def test_the_committed_table_is_what_the_records_give() -> None:
    done = call("recipes", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
