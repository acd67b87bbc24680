"""The page of an algorithm, from a table of trials."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from harness.board.algorithm_page import draw_curves, format_index, format_page
from harness.board.algorithm_table import describe_algorithm
from harness.config.compose import load_run

TIMES = pd.DataFrame({"milliseconds": [0.6], "fused_adamw": [0.2]}, index=["lion"])


def trial(submission: str, workload: str, **values: Any) -> dict[str, Any]:
    shared = {"study": 0, "trial": 1, "status": "reached", "steps": 400.0, "best": 1.2, "budget": 1600}
    return (
        shared | {"submission": submission, "workload": workload, "direction": "min", "target": 1.3, "lr": 0.1} | values
    )


TRIALS = pd.DataFrame([
    trial("lion", "gpt2", lr=0.001), trial("lion", "gpt2", lr=0.002, steps=200.0),
    trial("lion", "gpt2", lr=0.004, status="exhausted", steps=None, best=1.31),
    trial("lion", "vit", status="exhausted", steps=None, best=0.9, direction="max"),
    trial("adamw", "gpt2", steps=800.0),
])  # fmt: skip
CURVES = pd.DataFrame({
    "submission": ["lion"] * 3 + ["adamw"] * 3, "step": [0, 100, 200] * 2, "value": [5.0, 2.0, 1.2, 5.0, 3.0, 1.5],
})  # fmt: skip


def page(name: str = "lion", trials: pd.DataFrame = TRIALS) -> str:
    run = load_run(["workload=gpt2", f"optimizer={name}"])
    return format_page(describe_algorithm(run, 4.0), run, trials, {"gpt2": CURVES}, "adamw", TIMES)


def test_it_has_the_rule_the_cost_and_what_came_of_it() -> None:
    text = page()
    assert "[arXiv:2302.06675](https://arxiv.org/abs/2302.06675)" in text
    assert "[lion.py](../../submissions/lion.py)" in text
    assert "takes 3.0 times as long" in text and "4.00 bytes per parameter" in text
    assert "m ← β2 m + (1 - β2) g" in text  # of the module's docstring
    assert "| gpt2 | 3 | 200 (12%) | 800 (50%) |" in text
    # A miss stands beside the hits, with the best value in the direction of the metric.
    assert "| vit | 1 | missed, 0.9000 | not run |" in text
    assert "| gpt2 | 0.004 | missed, 1.3100 |" in text


def test_without_records_it_says_so() -> None:
    text = page(trials=TRIALS[TRIALS["submission"] == "adamw"])
    assert "None of the committed records is of it." in text and "## Learning rate" not in text


@pytest.mark.parametrize("name", ["adamw", "ema"])
def test_classes_of_other_libraries_and_wrappers(name: str) -> None:
    assert "## Rule" in page(name)


def test_curves_are_drawn_within_the_picture_and_escaped() -> None:
    rows = CURVES.assign(submission=CURVES["submission"].replace("lion", "<b>"))
    svg = draw_curves(rows, "<b>", "adamw", 1.3)
    assert "&lt;b&gt;" in svg and "<b>" not in svg and svg.count("<polyline") == 2 and "<line" in svg
    points = [float(c) for pair in svg.split('points="')[1].split('"')[0].split() for c in pair.split(",")]
    assert all(0 <= x <= 640 for x in points[::2]) and all(0 <= y <= 260 for y in points[1::2])
    assert draw_curves(CURVES[:0], "lion", "adamw", None) == "No curve is in the records."


def test_the_list_has_the_best_outcome_of_each() -> None:
    run = load_run(["workload=gpt2", "optimizer=lion"])
    text = format_index([describe_algorithm(run, 4.0)], TRIALS)
    assert "| [lion](lion.md) | Lion, EvoLved Sign Momentum | 200 (12%) | missed, 0.9000 |" in text
