"""The table of recipes: what every submission does on every workload as shipped, with one seed and no tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from harness.scoring.load_records import Records


def format_recipes(records: Records) -> str:
    """Markdown, a row per submission: the one with most targets reached first, then by share of the budget.

    Every trial needs a manifest; KeyError without one.
    """
    trials, targets = records.trials, records.targets
    # Not how far a trial went, since batches of another size may overshoot the budget.
    budgets = np.array([records.manifests[label].max_steps for label in trials.index], dtype=float)
    trials = trials.assign(share=trials["steps"] / budgets)
    # A miss has no steps, so `count` is the number of targets reached and `mean` that of the hits alone.
    by_name = trials.groupby("submission")["share"].agg(["count", "mean"]).reset_index()
    order = by_name.sort_values(by=["count", "mean", "submission"], ascending=[False, True, True])["submission"]
    cells = {(row["submission"], row["workload"]): _cell(row) for row in trials.to_dict("records")}
    headings = ["submission", *(f"{w}: {targets.targets[w].metric} {targets.targets[w].value:g}" for w in targets.base)]
    rows = [[f"`{name}`", *(cells.get((name, workload), "not run") for workload in targets.base)] for name in order]
    by_workload = trials.groupby("workload")["share"]
    reached, run = by_workload.count(), by_workload.size()
    summary = ", ".join(f"`{w}` by {reached[w]} of {run[w]}" for w in targets.base)
    lines = [headings, ["---"] * len(headings), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"Targets reached: {summary}.\n\n{table}"


def _cell(row: dict[Any, Any]) -> str:
    if row["status"] == "reached":
        return f"{row['steps']:.0f} ({100 * row['share']:.0f}%)"
    if pd.isna(row["best"]):
        return str(row["status"])
    best = f"missed, best {row['best']:.4g}"
    return best if row["status"] == "exhausted" else f"{best} ({row['status']} at step {row['limit_steps']:.0f})"
