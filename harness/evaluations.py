"""The rows of many eval_measurements.csv at once, and where each trial met its target.

Files with the same header are parsed together, as one text, by Arrow: thousands of files cost little more than one.
What Arrow refuses is read again alone, cell by cell, and said.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

Array = NDArray[np.float64]

TIME = ("score", "accumulated_submission_time")
"""AlgoPerf scores by `score`; the two are equal in its records and in ours."""
FURTHER = {"examples": "backward_examples", "peak_memory_bytes": "peak_memory_bytes",
           "data_wait": "accumulated_data_wait_time", "build": "accumulated_build_time",
           "compile": "accumulated_compile_time"}  # fmt: skip
NO_ROWS = "missing: the file has no rows"
NULLS = ["", "nan", "NaN", "NA", "None", "null", "-nan"]


@dataclass(frozen=True)
class Evaluations:
    """Every evaluation of every trial, in order: arrays float [rows], NaN where a cell is empty or unusable."""

    trial: NDArray[np.int64]
    """Row label of the trial in `Records.trials`, ascending."""
    seconds: Array
    steps: Array
    value: Array
    """Of the metric that the trial's target is about."""
    further: dict[str, Array]

    def of(self, trial: int) -> slice:
        return slice(*np.searchsorted(self.trial, [trial, trial + 1]))


def parse(contents: dict[int, bytes], metrics: dict[int, str]) -> tuple[Evaluations, dict[int, str], dict[int, str]]:
    """Rows of the files `contents` by trial, of which the columns of time, steps and `metrics` are read.

    Returns the rows, the trials that were refused and why, and those that were repaired and how: a row with too few or
    too many cells, or whose time or step is no number, keeps its place and loses its value.
    """
    groups: dict[tuple[bytes, str], list[int]] = defaultdict(list)
    refused: dict[int, str] = {}
    repaired: dict[int, str] = {}
    bodies: dict[int, bytes] = {}
    for trial, content in contents.items():
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        header, _, body = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        if not body.strip():
            refused[trial] = NO_ROWS
            continue
        bodies[trial] = body if body.endswith(b"\n") else body + b"\n"
        groups[header, metrics[trial]].append(trial)
    pieces: list[tuple[list[int], list[int], dict[str, Array]]] = []
    for (first_line, metric), members in groups.items():
        names = _header(first_line)
        wanted = {"value": metric, "steps": "global_step"}
        wanted |= {"seconds": next((name for name in TIME if name in names), TIME[0])}
        missing = [name for name in wanted.values() if name not in names]
        if missing or len(set(names)) < len(names):
            why = f"no column {', '.join(missing)}" if missing else "a column stands there twice"
            refused |= dict.fromkeys(members, f"refused: {why}")
            continue
        wanted |= {key: name for key, name in FURTHER.items() if name in names}
        _parse_group(members, bodies, names, wanted, pieces, refused, repaired)
    return _joined(pieces, repaired), refused, repaired


def _header(raw: bytes) -> list[str]:
    text = raw.decode("utf-8", errors="replace")
    try:
        return [name.strip() for name in next(csv.reader([text]), [])]
    except csv.Error:
        return []


Pieces = list[tuple[list[int], list[int], dict[str, Array]]]


def _parse_group(
    members: list[int],
    bodies: dict[int, bytes],
    header: list[str],
    wanted: dict[str, str],
    pieces: Pieces,
    refused: dict[int, str],
    repaired: dict[int, str],
) -> None:
    counts = [bodies[trial].count(b"\n") for trial in members]
    columns = _arrow([bodies[trial] for trial in members], header, wanted, sum(counts))
    if columns is not None:
        pieces.append((members, counts, columns))
    elif len(members) > 1:  # find the few that are not clean
        half = len(members) // 2
        for part in (members[:half], members[half:]):
            _parse_group(part, bodies, header, wanted, pieces, refused, repaired)
    else:
        trial = members[0]
        slow = _cell_by_cell(bodies[trial], header, wanted)
        if isinstance(slow, str):
            refused[trial] = slow
            return
        found, notes = slow
        pieces.append((members, [len(found["value"])], found))
        repaired[trial] = notes


def _arrow(bodies: list[bytes], header: list[str], wanted: dict[str, str], count: int) -> dict[str, Array] | None:
    """The columns, or None where a file is not a clean table of numbers."""
    text = b"".join(bodies)
    if b'"' in text or b"\0" in text:
        return None
    names = list(wanted.values())
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(text),
            read_options=pa.csv.ReadOptions(column_names=header, block_size=8 << 20),
            parse_options=pa.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            convert_options=pa.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.float64()), null_values=NULLS
            ),
        )
    except (pa.ArrowException, UnicodeError):
        return None
    if table.num_rows != count:
        return None
    return {key: table[name].to_numpy() for key, name in wanted.items()}


def _cell_by_cell(body: bytes, header: list[str], wanted: dict[str, str]) -> tuple[dict[str, Array], str] | str:
    """The columns and what was repaired, or why the file is refused."""
    if b"\0" in body:
        return "refused: a binary file"
    lines = body.decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    try:
        rows = list(csv.reader(lines))
    except csv.Error as error:
        return f"refused: not a CSV file ({error})"
    position = {key: header.index(name) for key, name in wanted.items()}
    ragged = sum(len(row) != len(header) for row in rows)
    columns = {key: np.full(len(rows), np.nan) for key in wanted}
    bad = 0
    for i, row in enumerate(rows):
        if len(row) == len(header):
            cells = {key: _number(row[place]) for key, place in position.items()}
            bad += (wrong := sum(number is None for number in cells.values()))
            if not wrong:
                for key, number in cells.items():
                    columns[key][i] = number
    if not np.isfinite(columns["seconds"]).any():
        return "refused: no row with a time"
    notes = [f"{ragged} rows with too few or too many cells"] * bool(ragged) + [f"{bad} cells without a number"] * bool(
        bad
    )
    return columns, "repaired: ignored " + (" and ".join(notes) or "quotes and empty lines")


def _number(cell: str) -> float | None:
    """None where the cell is no number; its whole row is then not to be trusted."""
    cell = cell.strip()
    if cell in NULLS:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _joined(pieces: Pieces, repaired: dict[int, str]) -> Evaluations:
    trial = np.concatenate([np.repeat(members, counts) for members, counts, _ in pieces] or [np.empty(0, int)])
    order = np.argsort(trial, kind="stable")

    def column(key: str) -> Array:
        parts = [columns.get(key, np.full(sum(counts), np.nan)) for _, counts, columns in pieces]
        return np.concatenate(parts or [np.empty(0)])[order]

    trial = trial[order]
    seconds, steps, value = column("seconds"), column("steps"), column("value")
    usable = np.isfinite(seconds) & (seconds >= 0) & np.isfinite(steps) & (steps >= 0)
    lost, counts = np.unique(trial[~usable], return_counts=True)
    for i, count in zip(lost.tolist(), counts.tolist(), strict=True):
        repaired.setdefault(i, f"repaired: ignored {count} rows whose time or step is no number from 0 on")
    blank = np.where(usable, 0.0, np.nan)
    further = {key: column(key) for key in FURTHER}
    return Evaluations(trial, seconds + blank, steps + blank, value + blank, further)


def crossings(rows: Evaluations, target: Array, minimise: NDArray[np.bool_]) -> dict[str, Array]:
    """Where each of the len(target) trials first met its target, as columns float [trials], NaN where it did not; and
    how far each went. `backwards` is a bool: its times or its steps decrease somewhere."""
    n = len(target)
    columns = {
        name: np.full(n, np.nan)
        for name in (
            "index", "seconds", "steps", "examples", "resolution_seconds", "resolution_steps", "limit_seconds",
            "limit_steps", "best", "final", "peak_memory_bytes", "data_wait_share", "build_seconds", "compile_seconds",
        )
    }  # fmt: skip
    columns["backwards"] = np.zeros(n, dtype=bool)
    if not len(rows.trial):
        return columns
    trials, start = np.unique(rows.trial, return_index=True)
    value = np.where(np.isfinite(rows.value), rows.value, np.nan)
    sign = np.where(minimise, 1.0, -1.0)[rows.trial]
    with np.errstate(invalid="ignore"):
        met = np.flatnonzero(value * sign <= target[rows.trial] * sign)
    who, first = np.unique(rows.trial[met], return_index=True)
    where = met[first]
    begin = start[np.searchsorted(trials, who)]
    columns["index"][who] = where - begin
    # The evaluation before is the last one with a time; an unusable row is stepped over.
    position = np.arange(len(rows.trial))
    usable = np.maximum.accumulate(np.where(np.isnan(rows.seconds), -1, position))
    before = usable[np.maximum(where - 1, 0)]
    within = (where > begin) & (before >= begin)
    for name, source in (("seconds", rows.seconds), ("steps", rows.steps)):
        columns[name][who] = source[where]
        columns[f"resolution_{name}"][who] = source[where] - np.where(within, source[before], 0.0)
        columns[f"limit_{name}"][trials] = np.fmax.reduceat(source, start)
        known = np.flatnonzero(~np.isnan(source))
        falls = known[1:][(np.diff(source[known]) < 0) & (rows.trial[known][1:] == rows.trial[known][:-1])]
        columns["backwards"][rows.trial[falls]] = True
    columns["examples"][who] = rows.further["examples"][where]
    columns["best"][trials] = np.fmin.reduceat(value * sign, start) * sign[start]
    last = np.append(start[1:], len(rows.trial)) - 1
    last = np.where(usable[last] >= start, usable[last], last)
    columns["final"][trials] = value[last]
    columns["peak_memory_bytes"][trials] = np.fmax.reduceat(rows.further["peak_memory_bytes"], start)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns["data_wait_share"][trials] = rows.further["data_wait"][last] / rows.seconds[last]
    for name in ("build", "compile"):
        columns[f"{name}_seconds"][trials] = rows.further[name][last]
    return columns
