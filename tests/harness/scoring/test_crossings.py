"""The interpolated crossing: where it lies, what it changes on a board, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.scoring.leaderboard import Leaderboard, score
from harness.scoring.load_records import load_records
from harness.scoring.targets import Target, Targets
from harness.scoring.trials_table import read_trials_table, write_trials_table
from harness.scoring.uncertainty import estimate
from tests.harness.folders import algoperf_trial
from tests.harness.scoring.simulated import TIED, noisy, studies_table

LM = Targets(("lm",), (), {"lm": Target("loss", "min", 2.0)})


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ([3.0, 2.5, 1.5], 0.5),
        ([3.0, 2.0], 1.0),
        # The second evaluation is worse than the first, which is the best so far.
        ([2.2, 2.9, 1.8], 0.5),
        # An evaluation without a value is stepped over.
        ([2.5, float("nan"), 1.5], 0.5),
        # No evaluation before, or none with a value: nothing to interpolate from.
        ([1.0], float("nan")),
        ([float("nan"), 1.0], float("nan")),
    ],
)
def test_a_crossing_is_interpolated_from_the_best_value_so_far(
    tmp_path: Path, values: list[float], share: float
) -> None:
    algoperf_trial(tmp_path / "x", [9.0] * 3, submission="before")  # its rows must not leak into the next trial
    algoperf_trial(tmp_path / "x", values)
    trial = load_records([tmp_path], LM).trials.set_index("submission").loc["a"]
    assert trial["crossing_share"] == pytest.approx(share, nan_ok=True)
    # The recorded time is that of the evaluation.
    assert trial["steps"] == 100 * len(values)


def test_a_crossing_of_a_metric_that_rises(tmp_path: Path) -> None:
    algoperf_trial(tmp_path, [0.2, 0.4, 0.8])
    targets = Targets(("lm",), (), {"lm": Target("loss", "max", 0.7)})
    assert load_records([tmp_path], targets).trials["crossing_share"].tolist() == pytest.approx([0.75])


def board_of(root: Path, **options: object) -> Leaderboard:
    return score(load_records([root], LM), **options)  # type: ignore[arg-type]


def test_a_board_has_the_crossing_and_algoperf_the_evaluation(tmp_path: Path) -> None:
    algoperf_trial(tmp_path, [3.0, 2.5, 1.5])
    ours, algoperf = board_of(tmp_path), board_of(tmp_path, mode="algoperf")
    assert ours.times.loc[0, ["steps", "seconds", "raw_seconds"]].tolist() == [250, 25, 30]
    assert algoperf.times.loc[0, ["steps", "seconds", "raw_seconds"]].tolist() == [300, 30, 30]


def test_the_better_of_two_trials_at_one_evaluation_is_the_one_that_crossed_first(tmp_path: Path) -> None:
    algoperf_trial(tmp_path, [3.0, 1.9], trial=1)
    algoperf_trial(tmp_path, [3.0, 1.0], trial=2)
    assert board_of(tmp_path).times["steps"].tolist() == [150]


def test_a_table_of_trials_keeps_the_crossings(tmp_path: Path) -> None:
    algoperf_trial(tmp_path / "x", [3.0, 2.5, 1.5])
    write_trials_table(load_records([tmp_path / "x"], LM), tmp_path / "trials.csv")
    assert score(read_trials_table(tmp_path / "trials.csv", LM)).times["steps"].tolist() == [250]
    # A table of before there were crossings has the times of the evaluations.
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    kept = [i for i, name in enumerate(lines[0].split(",")) if name != "crossing_share"]
    lines = [",".join(line.split(",")[i] for i in kept) for line in lines]
    (tmp_path / "trials.csv").write_text("\n".join(lines) + "\n")
    assert score(read_trials_table(tmp_path / "trials.csv", LM)).times["steps"].tolist() == [300]


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_interpolated_times_have_no_dead_zone_and_an_error_that_studies_share() -> None:
    log_times = np.log([[3.0, 4.0], [3.12, 4.16]])[..., None]
    log_times = log_times + 0.005 * np.random.default_rng(0).standard_normal((2, 2, 60))
    of_evaluations = studies_table(log_times[..., :5], resolution=0.05)
    verdicts = [
        estimate(of_evaluations.assign(interpolated=is_interpolated), baseline=None).pairs["verdict"][0]
        for is_interpolated in (False, True)
    ]
    assert verdicts == ["no difference shown", "a faster"]
    # Of sixty studies the spread is nothing, and the error of a crossing, 1.4% of each of four cells, stays.
    many = studies_table(log_times, resolution=0.05).assign(interpolated=True)
    pair = estimate(many, baseline=None).pairs.iloc[0]
    assert (pair["high"] - pair["low"]) / 2 == pytest.approx(1.96 * 0.05 / np.sqrt(12), rel=0.05)


def test_ten_studies_find_more_than_nine() -> None:
    """The model changes at ten; with its medians they found as little as seven."""
    log_medians = TIED[:2] + np.array([[0.0], [0.05]])

    def share_found(studies: int) -> float:
        tables = [studies_table(noisy(log_medians, studies, seed)) for seed in range(120)]
        pairs = [estimate(table, baseline=None, draws=50).pairs.iloc[0] for table in tables]
        return float(np.mean([pair["verdict"] == "a faster" for pair in pairs]))

    of_nine, of_ten = (share_found(studies) for studies in (9, 10))
    assert of_ten > of_nine >= 0.6


def test_no_estimate_lies_outside_its_interval(tmp_path: Path) -> None:
    """Medians of three against means of logs: of these studies one is far from the others."""
    for study, last in enumerate((10.0, 10.1, 30.0)):
        algoperf_trial(tmp_path, [3.0, 1.0], seconds=last, study=study)
        algoperf_trial(tmp_path, [3.0, 1.0], seconds=10.0 + 0.1 * study, study=study, submission="b")
    for mode in ("default", "algoperf"):
        board = board_of(tmp_path, mode=mode, baseline="b")
        for table, name in ((board.scores, "score"), (board.scores, "speedup"), (board.times, "seconds")):
            assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()


@pytest.mark.parametrize("mode", ["default", "algoperf"])
def test_a_speed_up_that_is_a_bound_lies_in_its_interval(tmp_path: Path, mode: str) -> None:
    """Lion on the committed board: one study met the target late, the others missed it after fewer seconds.

    The shortest study, 20 seconds, made the bound, and the longest, 90, the interval.
    """
    algoperf_trial(tmp_path, [3.0, 2.5, 1.5], seconds=30.0, study=0)
    for study in (1, 2):
        algoperf_trial(tmp_path, [3.0, 2.5], seconds=10.0 * study, study=study)
    for study in range(3):
        algoperf_trial(tmp_path, [3.0, 1.0], seconds=15.0 + 0.1 * study, study=study, submission="b")
        # For the degrees of freedom.
        algoperf_trial(tmp_path, [3.0, 1.0], seconds=14.0 + study, study=study, submission="c")
    row = board_of(tmp_path, mode=mode, baseline="b").scores.set_index("submission").loc["a"]
    assert row["speedup_reading"] == "upper bound" and row["speedup_low"] == 0
    base = 15.1 * (2.0 if mode == "algoperf" else 1.5)
    # The median of what the studies show: at least 20 and 40 seconds, and 90 or its crossing.
    assert row["speedup"] == pytest.approx(base / 40)
    assert row["speedup"] < row["speedup_high"] < 2 * row["speedup"]
