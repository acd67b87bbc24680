"""The table of recipes: what every submission did on every workload as shipped, with one seed and no tuning."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.reading import Records


def table(records: Records) -> str:
    """Markdown, a row per submission: most targets reached first, then the smallest share of the budget."""
    trials, targets = records.trials, records.targets
    # Not how far a trial went: batches of its own size may overshoot the budget.
    budgets = [records.manifests[label]["identity"]["workload"]["max_steps"] for label in trials.index]
    trials = trials.assign(share=trials["steps"] / budgets)
    by_name = trials.groupby("submission")["share"].agg(["count", "mean"]).reset_index()
    order = by_name.sort_values(by=["count", "mean", "submission"], ascending=[False, True, True])["submission"]
    cells = {(row["submission"], row["workload"]): _cell(row) for row in trials.to_dict("records")}
    head = ["submission", *(f"{w}: {targets.targets[w].metric} {targets.targets[w].value:g}" for w in targets.base)]
    rows = [[f"`{name}`", *(cells.get((name, workload), "not run") for workload in targets.base)] for name in order]
    run = trials.groupby("workload")["share"]
    reached, of = run.count(), run.size()
    summary = ", ".join(f"`{w}` by {reached[w]} of {of[w]}" for w in targets.base)
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"Targets reached: {summary}.\n\n{table}"


def _cell(row: dict[Any, Any]) -> str:
    if row["status"] == "reached":
        return f"{row['steps']:.0f} ({100 * row['share']:.0f}%)"
    if pd.isna(row["best"]):
        return str(row["status"])
    best = f"missed, best {row['best']:.4g}"
    return best if row["status"] == "exhausted" else f"{best} ({row['status']} at step {row['limit_steps']:.0f})"
