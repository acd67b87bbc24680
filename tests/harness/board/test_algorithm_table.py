"""The committed table of algorithms is what the YAMLs give."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness.board.algorithm_table import WRAPPED, Algorithm, format_algorithms, read_times
from harness.errors import UserError
from harness.interface.needs import Need
from tests.processes import call

ROOT = Path(__file__).parents[3]
TIMES = ROOT / "benchmarks" / "optimizer_step_mini.csv"
ONE = Algorithm(
    "mine", "this | that", "Me 2024, arXiv:2401.00001", ("submissions.lion.Lion", "submissions.sam.SAM"),
    WRAPPED, (Need.LOSS, Need.TOTAL_STEPS), 8.004, ("each step",),
)  # fmt: skip


@pytest.mark.xdist_group("submissions")
def test_the_committed_table_is_what_the_yamls_give_and_one_other_number_is_found(tmp_path: Path) -> None:
    """By one run with another time for Lion: its row differs, tenfold, and no other."""
    times = pd.read_csv(TIMES)
    times.loc[times["submission"] == "lion", "milliseconds"] *= 10
    times.to_csv(tmp_path / "times.csv", index=False)
    done = call("algorithms", "--check", "--times", tmp_path / "times.csv")
    changed = [line for line in done.stdout.splitlines() if line.startswith(("+|", "-|"))]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(changed) == 2 and all("`lion`" in line for line in changed), done.stdout
    before, after = (float(line.split("|")[-2]) for line in changed)
    assert after == pytest.approx(10 * before, rel=0.06)


def test_a_row() -> None:
    times = pd.DataFrame({"milliseconds": [3.0], "fused_adamw": [2.0]}, index=["mine"])
    (row,) = [line for line in format_algorithms([ONE], times).splitlines() if "`mine`" in line]
    assert row == (
        r"| `mine` ([lion.py](../submissions/lion.py), in [sam.py](../submissions/sam.py)) | this \| that "
        "| Me 2024, [arXiv:2401.00001](https://arxiv.org/abs/2401.00001) | loss, total steps | each step | 8.00 | 1.5 |"
    )
    assert "not timed" in format_algorithms([ONE], times.rename(index={"mine": "other"}))


def test_a_file_without_times_is_refused(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="make it with"):
        read_times(tmp_path / "times.csv")
