"""The files of a leaderboard: scores.csv, times.csv, LEADERBOARD.md, leaderboard.tex and the page under site/.

All names come from records that anyone may have sent, so each format escapes them: nothing is rendered live in Markdown
or LaTeX, and no cell of a CSV begins like a spreadsheet's formula.
"""

from __future__ import annotations

import html
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd

from harness import scoring
from harness.leaderboard import Leaderboard
from harness.problems import UserError
from harness.tunability import Tunability

TEXTS = ("scores.csv", "times.csv", "LEADERBOARD.md", "leaderboard.tex")
TUNABILITY = ("tunability.csv", "bands.csv")
"""Where studies have several trials."""


def texts(board: Leaderboard, title: str, commands: list[str]) -> dict[str, str]:
    """Content of every file but the page, by name."""
    found = {
        "scores.csv": _csv(board.scores),
        "times.csv": _csv(board.times),
        "LEADERBOARD.md": _markdown(board, title, commands),
        "leaderboard.tex": _latex(board, title),
    }
    if board.tunability is not None:
        found |= dict(zip(TUNABILITY, (_csv(board.tunability.cells), _csv(board.tunability.bands)), strict=True))
    return found


def write(board: Leaderboard, folder: Path, title: str, commands: list[str], *, page: bool = True) -> None:
    """Write the files into `folder`, each whole or not at all, and nothing outside it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts(board, title, commands).items():
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(folder / name)
        if page:
            from harness.page import write as write_page

            write_page(page_data(board, title, commands), folder / "site")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from error


def differences(board: Leaderboard, folder: Path, title: str, commands: list[str]) -> list[str]:
    """What in `folder` is not what the records give. Numbers may differ in the last digits, as between machines."""
    found = []
    for name, text in texts(board, title, commands).items():
        try:
            committed = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            found.append(f"{folder / name}: {error.strerror}")
            continue
        before, after = committed.splitlines(), text.splitlines()
        if len(before) != len(after):
            found.append(f"{folder / name}: {len(before)} lines, the records give {len(after)}")
        for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
            if not _same(old, new):
                found.append(f"{folder / name}:{number}\n  there   {old}\n  records {new}")
    return found


_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def _same(old: str, new: str) -> bool:
    if old == new:
        return True
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(a == b or math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=_last_digit(a, b)) for a, b in pairs)


def _last_digit(*numbers: str) -> float:
    """One unit in the last place of numbers that were rounded for reading, nothing for whole or long ones."""
    digits = {len(number.partition(".")[2]) for number in numbers}
    return 1.001 * 10.0 ** -digits.pop() if len(digits) == 1 and digits <= {1, 2, 3, 4} else 0.0


# ---- CSV ---------------------------------------------------------------------------------------------------------


def _csv(table: pd.DataFrame) -> str:
    text = io.StringIO()
    safe = table.copy()
    for column in safe.select_dtypes(["object", "string"]):
        safe[column] = safe[column].map(lambda value: _inert(value) if isinstance(value, str) else value)
    safe.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def _inert(text: str) -> str:
    """No spreadsheet takes it for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


# ---- Markdown ----------------------------------------------------------------------------------------------------


def _markdown(board: Leaderboard, title: str, commands: list[str]) -> str:
    scores = board.scores
    lines = [f"# {_plain(title)}", ""]
    lines += ["Made by", "", *(f"    {command}" for command in commands), "", *_sentences(board), ""]
    heads = ["rank", "submission", "score", "by steps", f"speed-up over {_plain(board.baseline or 'no baseline')}",
             "peak memory", "state, bytes per parameter", "data wait", "trials"]  # fmt: skip
    rows = [
        [
            _interval_of_ranks(row), _plain(row["submission"]), _with_interval(row, "score", 3),
            _number(row["steps_score"], 3), _speedup(row), _bytes(row["peak_memory_bytes"]),
            _number(row["state_bytes_per_parameter"], 1), _percent(row["data_wait_share"]), _statuses(row),
        ]
        for _, row in scores.iterrows()
    ]  # fmt: skip
    lines += _table(heads, rows)
    lines += ["", "## Time to target", "", "Seconds (with their interval), and nominal steps in brackets.", ""]
    names = list(board.targets.scored)
    lines += _table(["submission", *(_plain(name) for name in names)], _time_rows(board, names))
    lines += _further_times(board.times, scores["submission"].tolist(), names)
    if board.tunability is not None:
        lines += _tunability(board.tunability, scores["submission"].tolist(), names)
    lines += ["", "## Targets", ""]
    targets = [
        [_plain(name), _plain(t.metric), f"{'at most' if t.direction == 'min' else 'at least'} {t.value:g}", t.version]
        for name, t in ((name, board.targets.targets[name]) for name in names)
    ]
    lines += _table(["workload", "metric", "target", "version"], targets)
    if board.records.problems:
        lines += ["", "## Remarks on reading", ""]
        lines += [f"- {_plain(problem.path)}: {_plain(problem.what)}" for problem in board.records.problems[:200]]
        if len(board.records.problems) > 200:
            lines.append(f"- and {len(board.records.problems) - 200} more")
    return "\n".join(lines) + "\n"


def _further_times(times: pd.DataFrame, submissions: list[str], workloads: list[str]) -> list[str]:
    """Seconds on other machines than the one of the scores, and energy, where they are known."""
    cells = times.set_index(["submission", "workload"])
    columns = [str(column) for column in cells if str(column).startswith("seconds_on_")]
    heads = {column: f"Seconds to target on {column.removeprefix('seconds_on_')}" for column in columns}
    if "energy_joules" in cells:
        heads["energy_joules"] = "Joules to target"
    lines = []
    for column, head in heads.items():
        rows = [[_plain(s), *(_number(cells.at[(s, w), column], 1) for w in workloads)] for s in submissions]
        lines += ["", f"## {_plain(head)}", "", *_table(["submission", *map(_plain, workloads)], rows)]
    return lines


def _tunability(found: Tunability, submissions: list[str], workloads: list[str]) -> list[str]:
    scores = {(row["submission"], row["k"]): row for _, row in found.overall.iterrows()}
    points = {(row["submission"], row["workload"]): row for _, row in found.cells[found.cells["k"] == 1].iterrows()}
    ks = sorted({k for _, k in scores})
    lines = ["", "## Tunability", ""]
    lines += [
        "Expected score if a study had only its first k trials, over all their orders. The intervals take trials for"
    ]
    lines += ["independent; where studies repeat the same points, they are too narrow.", ""]
    rows = [
        [_plain(s), *(_with_interval(scores[s, k], "score", 3) if (s, k) in scores else "–" for k in ks)]
        for s in submissions
    ]
    lines += _table(["submission", *(f"k = {k}" for k in ks)], rows)
    lines += ["", "Trials that met the target, and the share of the search space that this suggests.", ""]
    rows = [[_plain(s), *(_share(points[s, w]) if (s, w) in points else "–" for w in workloads)] for s in submissions]
    return lines + _table(["submission", *(_plain(name) for name in workloads)], rows)


def _share(cell: pd.Series) -> str:
    low, high = (100 * cell[f"reached_{end}"] for end in ("low", "high"))
    return f"{cell['trials_reached']} of {cell['trials']}, {low:.0f} to {high:.0f}%"


def _sentences(board: Leaderboard) -> list[str]:
    return [f"- {_plain(note)}" for note in board.notes]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]


def _time_rows(board: Leaderboard, names: list[str]) -> list[list[str]]:
    by_cell = {(row["submission"], row["workload"]): row for _, row in board.times.iterrows()}
    rows = []
    for submission in board.scores["submission"]:
        cells = [_plain(submission)]
        for name in names:
            row = by_cell[submission, name]
            if row["status"] == "reached":
                mark = "" if row["counts"] else " (does not count)"
                cells.append(f"{_with_interval(row, 'seconds', 1)} [{_number(row['steps'], 0)}]{mark}")
            elif row["status"] == "missed":
                cells.append(f"missed ({row['studies_reached']} of {row['studies']} studies reached)")
            else:
                cells.append("not run")
        rows.append(cells)
    return rows


def _plain(text: str) -> str:
    """Text as text: no Markdown, no HTML, one line."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    text = re.sub(r"([\\`*_\[\]~#$])", r"\\\1", text)
    # An entity instead of a backslash where GitHub would still see a cell, a link or a mention.
    return text.replace("|", "&#124;").replace("://", "&#58;//").replace("@", "&#64;").replace("www.", "www&#46;")


def _number(value: Any, digits: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"


def _with_interval(row: pd.Series, name: str, digits: int) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(low) or math.isnan(high):
        return _number(value, digits)
    return f"{_number(value, digits)} ({_number(low, digits)} to {_number(high, digits)})"


def _interval_of_ranks(row: pd.Series) -> str:
    low, high = row["rank_low"], row["rank_high"]
    if math.isnan(low):
        return "–"
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _speedup(row: pd.Series) -> str:
    reading = row["speedup_reading"]
    if reading == "none":
        return "no number: each missed what the other met, or nothing is shared"
    if not isinstance(reading, str) or math.isnan(row["speedup"]):
        return "–"
    if reading == "exact":
        return _with_interval(row, "speedup", 2)
    return f"{'at most' if reading == 'upper bound' else 'at least'} {_number(row['speedup'], 2)}"


def _bytes(value: float) -> str:
    return "–" if math.isnan(value) else f"{value / 2**20:,.0f} MiB"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


STATUSES = ("reached", "exhausted", "pruned", "diverged", "out_of_memory", "failed", "unfinished", "missing", "invalid")


def _statuses(row: pd.Series) -> str:
    said = [f"{row[status]} {status.replace('_', ' ')}" for status in STATUSES if row.get(status)]
    return ", ".join(said + ([f"{row['disturbed']} disturbed"] if row["disturbed"] else []))


# ---- LaTeX -------------------------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in " ".join(str(text).split()))


def _latex(board: Leaderboard, title: str) -> str:
    heads = ["Rank", "Submission", "Score", "By steps", f"Speed-up over {_tex(board.baseline or 'no baseline')}"]
    rows = [
        [_interval_of_ranks(row), _tex(row["submission"]), _with_interval(row, "score", 3),
         _number(row["steps_score"], 3), "no number" if row["speedup_reading"] == "none" else _speedup(row)]
        for _, row in board.scores.iterrows()
    ]  # fmt: skip
    lines = [f"% {' '.join(title.split())}", r"\begin{tabular}{llrrr}", r"\toprule"]
    for number, cells in enumerate([heads, *rows]):
        line = " & ".join(cell.replace("–", "--").replace("∞", r"$\infty$") for cell in cells)
        lines += [line + r" \\"] + [r"\midrule"] * (number == 0)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


# ---- the page ----------------------------------------------------------------------------------------------------


TRIAL = ["submission", "workload", "study", "trial", "status", "seconds", "steps", "best", "final"]


def page_data(board: Leaderboard, title: str, commands: list[str]) -> dict[str, Any]:
    """What harness.page.write shows; floats that are not finite become None."""
    targets, records = board.targets, board.records
    detectable = board.uncertainty.detectable
    times = {name: group.set_index("workload") for name, group in board.times.groupby("submission")}
    trials = {name: group for name, group in records.trials.groupby("submission")}
    submissions = []
    for _, row in board.scores.iterrows():
        name = row["submission"]
        manifests = [records.manifests[i] for i in trials[name].index if i in records.manifests]
        optimizer = manifests[0].get("config", {}).get("optimizer", {}) if manifests else {}
        submissions.append(
            _finite(row.drop(labels=list(STATUSES), errors="ignore").to_dict())
            | {
                "name": name,
                "description": optimizer.get("description"),
                "speedup_note": row["speedup_reading"] if isinstance(row["speedup_reading"], str) else None,
                "rank_low": _whole(row["rank_low"]),
                "rank_high": _whole(row["rank_high"]),
                "disturbed": int(row["disturbed"]),
                "statuses": {status: int(row[status]) for status in STATUSES if row.get(status)},
                "config": manifests[0].get("identity") if manifests else None,
                "times": {
                    workload: _finite(cell.rename({"seconds_low": "low", "seconds_high": "high"}).to_dict())
                    for workload, cell in times[name].drop(columns="submission").iterrows()
                },
                "profile": board.profile.loc[name].tolist(),
                "tunability": _tunability_data(board.tunability, name),
                "trials": [
                    _finite(trial)
                    | {"hyperparameters": records.manifests.get(i, {}).get("hyperparameters"), "note": None}
                    for i, trial in _rows(trials[name])
                ],
            }
        )
    return {
        "title": title,
        "subtitle": None,
        "mode": board.mode,
        "baseline": board.baseline,
        "tau_max": scoring.TAU_MAX,
        "method": board.uncertainty.method,
        "detectable": detectable if math.isfinite(detectable) else None,
        "notes": board.notes[2 if math.isfinite(detectable) else 1 :],  # the page says those itself
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
        "submissions": submissions,
        "taus": board.profile.columns.tolist(),
        "curves": _curves(board),
        "problems": [{"path": problem.path, "what": problem.what} for problem in records.problems],
    }


def _curves(board: Leaderboard) -> list[dict[str, Any]]:
    rows, curves = board.records.rows, []
    for i, trial in _rows(board.records.trials):
        where = rows.of(i)
        if where.start < where.stop:
            curves.append(
                {key: trial[key] for key in ("submission", "workload")}
                | {key: int(trial[key]) for key in ("study", "trial")}
                | {
                    "seconds": _list(rows.seconds[where]),
                    "steps": _list(rows.steps[where]),
                    "values": _list(rows.value[where]),
                }
            )
    return curves


def _tunability_data(found: Tunability | None, submission: str) -> dict[str, Any] | None:
    if found is None:
        return None
    cells = found.cells[found.cells["submission"] == submission]
    columns = ["score", "score_low", "score_high", "reached", "seconds"]
    return {
        "curves": {
            workload: {"k": group["k"].tolist()} | {column: _list(group[column]) for column in columns}
            for workload, group in cells.groupby("workload")
        },
        "bands": [_finite(row) for row in found.bands[found.bands["submission"] == submission].to_dict("records")],
    }


def _rows(trials: pd.DataFrame) -> list[tuple[int, dict[Any, Any]]]:
    return list(zip(trials.index.tolist(), trials[TRIAL].to_dict("records"), strict=True))


def _list(values: Any) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _whole(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def _finite(values: dict[Any, Any]) -> dict[str, Any]:
    plain = {str(key): value.item() if hasattr(value, "item") else value for key, value in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
