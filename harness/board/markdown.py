"""A leaderboard as Markdown: LEADERBOARD.md."""

from __future__ import annotations

import html
import re

import pandas as pd

from harness.board.formats import (
    UNKNOWN,
    format_bytes,
    format_interval,
    format_number,
    format_percent,
    format_ranks,
    format_speedup,
    format_statuses,
)
from harness.scoring.leaderboard import Leaderboard
from harness.scoring.tunability import Tunability

MAX_REMARKS = 200
"""Remarks on reading that are listed; the number of further ones is stated."""


def format_markdown(board: Leaderboard, title: str, commands: list[str]) -> str:
    """The whole document. commands: those that make it again, shown as they are."""
    submissions, workloads = board.scores["submission"].tolist(), list(board.targets.scored)
    lines = [f"# {escape(title)}", "", "Made by", ""]
    lines += [*(f"    {command}" for command in commands), "", *(f"- {escape(note)}" for note in board.notes), ""]
    lines += _scores(board)
    lines += ["", "## Time to target", "", "Seconds (with their interval), and nominal steps in brackets.", ""]
    lines += _times(board, submissions, workloads)
    lines += _further_times(board.times, submissions, workloads)
    if board.tunability is not None:
        lines += _tunability(board.tunability, submissions, workloads)
    lines += ["", "## Targets", "", *_targets(board, workloads)]
    problems = board.records.problems
    if problems:
        lines += ["", "## Remarks on reading", ""]
        lines += [f"- {escape(problem.path)}: {escape(problem.message)}" for problem in problems[:MAX_REMARKS]]
        if len(problems) > MAX_REMARKS:
            lines.append(f"- and {len(problems) - MAX_REMARKS} more")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Any text as Markdown that shows it: no markup of its own, no HTML, one line."""
    # HTML first, as entities begin with &. Without quotes: the entity of an apostrophe has a #, which would be escaped.
    text = html.escape(" ".join(str(text).split()), quote=False)
    text = re.sub(r"([\\`*_\[\]~#$])", r"\\\1", text)
    # An entity instead of a backslash where GitHub would still see a cell, a link or a mention. Last, since
    # entities have a # too.
    return text.replace("|", "&#124;").replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [headings, ["---"] * len(headings), *rows]]


def _scores(board: Leaderboard) -> list[str]:
    """Lines of the table of scores, a row per submission."""
    headings = [
        "rank", "submission", "score", "by steps", f"speed-up over {escape(board.baseline or 'no baseline')}",
        "peak memory", "state, bytes per parameter", "data wait", "trials",
    ]  # fmt: skip
    rows = [
        [
            format_ranks(row),
            escape(row["submission"]),
            format_interval(row, "score", 3),
            format_number(row["steps_score"], 3),
            format_speedup(row),
            format_bytes(row["peak_memory_bytes"]),
            format_number(row["state_bytes_per_parameter"], 1),
            format_percent(row["data_wait_share"]),
            format_statuses(row),
        ]
        for _, row in board.scores.iterrows()
    ]
    return _table(headings, rows)


def _times(board: Leaderboard, submissions: list[str], workloads: list[str]) -> list[str]:
    cells = {(row["submission"], row["workload"]): row for _, row in board.times.iterrows()}
    rows = [[escape(s), *(_time_cell(cells[s, w]) for w in workloads)] for s in submissions]
    return _table(["submission", *map(escape, workloads)], rows)


def _time_cell(row: pd.Series) -> str:
    if row["status"] == "reached":
        mark = "" if row["counts"] else " (does not count)"
        return f"{format_interval(row, 'seconds', 1)} [{format_number(row['steps'], 0)}]{mark}"
    if row["status"] == "missed":
        return f"missed ({row['studies_reached']} of {row['studies']} studies reached)"
    return "not run"


def _further_times(times: pd.DataFrame, submissions: list[str], workloads: list[str]) -> list[str]:
    """Seconds on other machines than the one of the scores, and energy, where they are known."""
    cells = times.set_index(["submission", "workload"])
    columns = [str(column) for column in cells if str(column).startswith("seconds_on_")]
    titles = {column: f"Seconds to target on {column.removeprefix('seconds_on_')}" for column in columns}
    if "energy_joules" in cells:
        titles["energy_joules"] = "Joules to target"
    lines = []
    for column, title in titles.items():
        rows = [[escape(s), *(format_number(cells.at[(s, w), column], 1) for w in workloads)] for s in submissions]
        lines += ["", f"## {escape(title)}", "", *_table(["submission", *map(escape, workloads)], rows)]
    return lines


def _tunability(tunability: Tunability, submissions: list[str], workloads: list[str]) -> list[str]:
    """Lines of the two tables on tunability, with their heading."""
    scores = {(row["submission"], row["k"]): row for _, row in tunability.overall.iterrows()}
    single = tunability.cells[tunability.cells["k"] == 1]
    points = {(row["submission"], row["workload"]): row for _, row in single.iterrows()}
    ks = sorted({k for _, k in scores})
    lines = ["", "## Tunability", ""]
    lines += [
        "Expected score if a study had only its first k trials, over all their orders. The intervals take trials for",
        "independent; where studies repeat the same points, they are too narrow.",
        "",
    ]
    rows = [
        [escape(s), *(format_interval(scores[s, k], "score", 3) if (s, k) in scores else UNKNOWN for k in ks)]
        for s in submissions
    ]
    lines += _table(["submission", *(f"k = {k}" for k in ks)], rows)
    lines += ["", "Trials that met the target, and the share of the search space that this suggests.", ""]
    rows = [
        [escape(s), *(_share_cell(points[s, w]) if (s, w) in points else UNKNOWN for w in workloads)]
        for s in submissions
    ]
    return lines + _table(["submission", *map(escape, workloads)], rows)


def _share_cell(row: pd.Series) -> str:
    low, high = (100 * row[f"reached_{end}"] for end in ("low", "high"))
    return f"{row['trials_reached']} of {row['trials']}, {low:.0f} to {high:.0f}%"


def _targets(board: Leaderboard, workloads: list[str]) -> list[str]:
    rows = [
        [escape(name), escape(t.metric), f"{'at most' if t.direction == 'min' else 'at least'} {t.value:g}", t.version]
        for name, t in ((name, board.targets.targets[name]) for name in workloads)
    ]
    return _table(["workload", "metric", "target", "version"], rows)
