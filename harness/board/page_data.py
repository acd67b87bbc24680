"""What the page of a leaderboard shows, as plain data: mappings, lists, texts, numbers and None."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from harness.records.status import DISPLAY_ORDER
from harness.scoring.benchmark_score import TAU_MAX
from harness.scoring.leaderboard import Leaderboard
from harness.scoring.tunability import Tunability

TRIAL_COLUMNS = ["submission", "workload", "study", "trial", "status", "seconds", "steps", "best", "final"]


def page_data(board: Leaderboard, title: str, commands: list[str]) -> dict[str, Any]:
    """What harness.board.page.write_page takes; numbers that are not finite become None."""
    targets, detectable = board.targets, board.uncertainty.detectable
    has_intervals = math.isfinite(detectable)
    times = {name: group.set_index("workload") for name, group in board.times.groupby("submission")}
    trials = {name: group for name, group in board.records.trials.groupby("submission")}
    return {
        "title": title,
        "subtitle": None,
        "mode": board.mode,
        "baseline": board.baseline,
        "tau_max": TAU_MAX,
        "method": board.uncertainty.method,
        "detectable": detectable if has_intervals else None,
        # The first note is the method, the second the detectable difference; the page has places of its own for them.
        "notes": board.notes[2 if has_intervals else 1 :],
        "commands": commands,
        "workloads": [
            {
                "name": name,
                "metric": t.metric,
                "direction": t.direction,
                "target": t.value,
                "held_out": name in targets.held_out,
            }
            for name, t in ((name, targets.targets[name]) for name in targets.scored)
        ],
        "submissions": [
            _submission(board, row, times[row["submission"]], trials[row["submission"]])
            for _, row in board.scores.iterrows()
        ],
        "taus": board.profile.columns.tolist(),
        "curves": _curves(board),
        "problems": [{"path": problem.path, "message": problem.message} for problem in board.records.problems],
    }


def _submission(board: Leaderboard, row: pd.Series, times: pd.DataFrame, trials: pd.DataFrame) -> dict[str, Any]:
    """A submission with all that its own page shows. row: of `Leaderboard.scores`; times, trials: its own."""
    name, all_manifests = row["submission"], board.records.manifests
    manifests = [all_manifests[i] for i in trials.index if i in all_manifests]
    # Without the counts by status, which are under `statuses`.
    return _finite(row.drop(labels=list(DISPLAY_ORDER), errors="ignore").to_dict()) | {
        "name": name,
        "description": manifests[0].optimizer.get("description") if manifests else None,
        "speedup_note": row["speedup_reading"] if isinstance(row["speedup_reading"], str) else None,
        "rank_low": _integer(row["rank_low"]),
        "rank_high": _integer(row["rank_high"]),
        "disturbed": int(row["disturbed"]),
        "statuses": {str(status): int(row[status]) for status in DISPLAY_ORDER if row.get(status)},
        "config": manifests[0].identity if manifests else None,
        "times": {
            workload: _finite(cell.rename({"seconds_low": "low", "seconds_high": "high"}).to_dict())
            for workload, cell in times.drop(columns="submission").iterrows()
        },
        "profile": board.profile.loc[name].tolist(),
        "tunability": _tunability(board.tunability, name),
        "trials": [
            _finite(trial)
            | {"hyperparameters": all_manifests[i].hyperparameters if i in all_manifests else None, "note": None}
            for i, trial in _trial_rows(trials)
        ],
    }


def _curves(board: Leaderboard) -> list[dict[str, Any]]:
    """The evaluations of every trial that has some: on the training clock, by nominal steps, and the metric."""
    rows, curves = board.records.rows, []
    for i, trial in _trial_rows(board.records.trials):
        of_trial = rows.rows_of(i)
        if of_trial.start < of_trial.stop:
            curves.append(
                {key: trial[key] for key in ("submission", "workload")}
                | {key: int(trial[key]) for key in ("study", "trial")}
                | {
                    "seconds": _numbers(rows.seconds[of_trial]),
                    "steps": _numbers(rows.steps[of_trial]),
                    "values": _numbers(rows.value[of_trial]),
                }
            )
    return curves


def _tunability(tunability: Tunability | None, submission: str) -> dict[str, Any] | None:
    if tunability is None:
        return None
    cells = tunability.cells[tunability.cells["submission"] == submission]
    bands = tunability.bands[tunability.bands["submission"] == submission]
    columns = ["score", "score_low", "score_high", "reached", "seconds"]
    return {
        "curves": {
            workload: {"k": group["k"].tolist()} | {column: _numbers(group[column]) for column in columns}
            for workload, group in cells.groupby("workload")
        },
        "bands": [_finite(row) for row in bands.to_dict("records")],
    }


def _trial_rows(trials: pd.DataFrame) -> list[tuple[int, dict[Any, Any]]]:
    return list(zip(trials.index.tolist(), trials[TRIAL_COLUMNS].to_dict("records"), strict=True))


def _numbers(values: Any) -> list[float | None]:
    """To six digits, which is finer than any screen."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _integer(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def _finite(values: dict[Any, Any]) -> dict[str, Any]:
    # `item` makes Python numbers of NumPy's, of which json refuses integers and booleans.
    plain = {str(key): value.item() if hasattr(value, "item") else value for key, value in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
