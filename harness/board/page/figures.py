"""The data of the plots; plots.js draws it.

Curves are apart from the rest: there are many, and of a large board a reader looks at a few.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

MAX_POINTS = 200
"""Of a curve. A screen has some thousand columns, and a point for every few of them draws the same line."""


def board_data(board: dict[str, Any]) -> dict[str, Any]:
    """All plots of the first page but the curves: submissions, workloads, profile, memory. Names are replaced by
    places."""
    submissions = board["submissions"]
    return {
        "submissions": [{"name": submission["name"], "style": index} for index, submission in enumerate(submissions)],
        "workloads": _workloads(board),
        "profile": {
            "taus": board["taus"],
            "tau_max": board["tau_max"],
            "shares": [submission["profile"] for submission in submissions],
        },
        "memory": memory(board),
    }


def submission_data(board: dict[str, Any], index: int) -> dict[str, Any]:
    """The plots of one submission's page but the curves: submissions (itself), workloads, tunability.

    index: its place in the board, which is also its style on the first page.
    """
    return {
        "submissions": [{"name": board["submissions"][index]["name"], "style": index}],
        "workloads": _workloads(board),
        "tunability": _tunability(board, index),
    }


def curves_of_submissions(board: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The curves of each submission, by its place, thinned: workload (its place), study, trial, and the axes seconds,
    steps and values. An axis in equal distances is {"first", "by", "count"}. Those of unknown workloads are left out.
    """
    workloads = {workload["name"]: index for index, workload in enumerate(board["workloads"])}
    of_submission: dict[str, list[dict[str, Any]]] = {entry["name"]: [] for entry in board["submissions"]}
    for curve in board["curves"]:
        if curve["submission"] in of_submission and curve["workload"] in workloads:
            place = workloads[curve["workload"]]
            keep = _thin(curve["values"], board["workloads"][place])
            of_submission[curve["submission"]].append(
                {
                    "workload": place,
                    "study": curve["study"],
                    "trial": curve["trial"],
                    **{axis: _axis([curve[axis][i] for i in keep]) for axis in ("seconds", "steps", "values")},
                }
            )
    return [of_submission[submission["name"]] for submission in board["submissions"]]


def _thin(values: list[float | None], workload: dict[str, Any]) -> list[int]:
    """The places of the points to draw, about MAX_POINTS at most: of each stretch the lowest and the highest, so that
    no spike is lost, both ends, and the first that meets the target, which has a marker."""
    count = len(values)
    if count <= MAX_POINTS:
        return list(range(count))
    keep = {0, count - 1}
    target, sign = workload["target"], 1 if workload["direction"] == "min" else -1
    if target is not None:
        met = (i for i, value in enumerate(values) if value is not None and sign * value <= sign * target)
        keep.update([first] if (first := next(met, None)) is not None else [])
    stretches = MAX_POINTS // 2
    for number in range(stretches):
        stretch = range(count * number // stretches, count * (number + 1) // stretches)
        known = [i for i in stretch if values[i] is not None]
        # A gap stays one.
        keep.update([i for i in stretch if values[i] is None][:1])
        if known:
            keep |= {min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)}
    return sorted(keep)


def _axis(values: list[float | None]) -> list[float | None] | dict[str, int]:
    """Numbers to five digits, as many as the page shows; equal distances between whole numbers in short."""
    numbers = [number for number in values if number is not None]
    if len(values) > 2 and len(numbers) == len(values) and all(number == int(number) for number in numbers):
        by = numbers[1] - numbers[0]
        if all(b - a == by for a, b in pairwise(numbers)):
            return {"first": int(numbers[0]), "by": int(by), "count": len(numbers)}
    return [_short(value) for value in values]


def _tunability(board: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """A curve for every workload on which the submission has one, with the workload's place."""
    curves = (board["submissions"][index].get("tunability") or {}).get("curves", {})
    places = {workload["name"]: place for place, workload in enumerate(board["workloads"])}
    return [{"workload": places[name]} | curve for name, curve in curves.items() if name in places]


def _workloads(board: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("name", "metric", "direction", "target")
    return [{key: workload[key] for key in keys} for workload in board["workloads"]]


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) else short


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
