"""The data of the plots; plots.js draws it."""

from __future__ import annotations

import math
from typing import Any


def board_data(board: dict[str, Any]) -> dict[str, Any]:
    """All plots of the first page: submissions, workloads, curves, profile, memory; names are replaced by places."""
    submissions = board["submissions"]
    place = {submission["name"]: index for index, submission in enumerate(submissions)}
    return {
        "submissions": [{"name": submission["name"], "style": index} for index, submission in enumerate(submissions)],
        "workloads": _workloads(board),
        "curves": _curves(board, place),
        "profile": {
            "taus": board["taus"],
            "tau_max": board["tau_max"],
            "shares": [submission["profile"] for submission in submissions],
        },
        "memory": memory(board),
    }


def submission_data(board: dict[str, Any], index: int) -> dict[str, Any]:
    """The plots of one submission's page: submissions (itself), workloads, curves, tunability.

    index: its place in the board, which is also its style on the first page.
    """
    name = board["submissions"][index]["name"]
    return {
        "submissions": [{"name": name, "style": index}],
        "workloads": _workloads(board),
        "curves": _curves(board, {name: 0}),
        "tunability": _tunability(board, index),
    }


def _tunability(board: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """A curve for every workload on which the submission has one, with the workload's place."""
    curves = (board["submissions"][index].get("tunability") or {}).get("curves", {})
    places = {workload["name"]: place for place, workload in enumerate(board["workloads"])}
    return [{"workload": places[name]} | curve for name, curve in curves.items() if name in places]


def _workloads(board: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("name", "metric", "direction", "target")
    return [{key: workload[key] for key in keys} for workload in board["workloads"]]


def _curves(board: dict[str, Any], place: dict[str, int]) -> list[dict[str, Any]]:
    """Curves with places for names; those of other submissions or unknown workloads are left out."""
    workloads = {workload["name"]: index for index, workload in enumerate(board["workloads"])}
    return [
        {
            "submission": place[curve["submission"]],
            "workload": workloads[curve["workload"]],
            "study": curve["study"],
            "trial": curve["trial"],
            **{axis: [_short(value) for value in curve[axis]] for axis in ("seconds", "steps", "values")},
        }
        for curve in board["curves"]
        if curve["submission"] in place and curve["workload"] in workloads
    ]


def _short(value: float | None) -> float | None:
    """Six digits: finer than any screen, and a third of the bytes."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def memory(board: dict[str, Any]) -> dict[str, Any]:
    """Peak memory against time, and who is on the front.

    Time is the geometric mean over the base workloads of seconds / fastest seconds, so 1 is being fastest everywhere.
    Who has no time on one of them has none here; `points` then has None and the plot shows it at the side. On the
    front: nobody needs less memory and less time. Returns points (time and bytes, by place), front (places, the fastest
    first) and workloads (the number of base workloads).
    """
    workloads = [workload["name"] for workload in board["workloads"] if not workload["held_out"]]
    times = [[_seconds(submission, workload) for workload in workloads] for submission in board["submissions"]]
    fastest = [min((time for time in column if time), default=None) for column in zip(*times, strict=True)]
    points = []
    for submission, row in zip(board["submissions"], times, strict=True):
        logs = [math.log(time / best) for time, best in zip(row, fastest, strict=True) if time and best]
        complete = bool(workloads) and len(logs) == len(workloads)
        bytes_ = submission["peak_memory_bytes"]
        points.append({"time": math.exp(sum(logs) / len(logs)) if complete else None, "bytes": bytes_})
    placed = [index for index, point in enumerate(points) if point["time"] is not None and point["bytes"] is not None]
    front: list[int] = []
    # From the fastest on, a point is on the front if it needs less memory than all before it.
    for index in sorted(placed, key=lambda i: (points[i]["time"], points[i]["bytes"])):
        if not front or points[index]["bytes"] < points[front[-1]]["bytes"]:
            front.append(index)
    return {"points": points, "front": front, "workloads": len(workloads)}


def _seconds(submission: dict[str, Any], workload: str) -> float | None:
    time = submission["times"].get(workload)
    return time["seconds"] if time and time["seconds"] and time["seconds"] > 0 else None
