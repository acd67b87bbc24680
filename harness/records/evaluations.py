"""The rows of eval_measurements.csv, of one trial or of thousands at once. The one reader of that file.

Files with the same header are parsed together, as one text, by Arrow: thousands of files cost little more than one.
Files that Arrow cannot parse fall back to a per-cell parser and are reported as repaired.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

# A process in which Arrow has started threads can abort when it ends (https://github.com/apache/arrow/issues/34314):
# about one in two hundred did on a busy machine. So Arrow starts none for few files (see _parse_with_arrow), and none
# for signals: Ctrl-C waits for the end of the parsing.
pa.enable_signal_handlers(False)

Array = NDArray[np.float64]

TIME_COLUMNS = ("score", "accumulated_submission_time")
"""The first of these that a file has holds its seconds. AlgoPerf scores by `score`; the two are equal in its records
and in ours."""
FURTHER_COLUMNS = {
    "examples": "backward_examples",
    "peak_memory_bytes": "peak_memory_bytes",
    "data_wait": "accumulated_data_wait_time",
    "build": "accumulated_build_time",
    "compile": "accumulated_compile_time",
}
"""What tables read besides seconds, steps and the metric, by the name it has in `Evaluations.further`."""
EVIDENCE_COLUMNS = {
    "second_clock": "accumulated_second_clock_time",
    "second_cpu": "accumulated_second_cpu_time",
    "counted_forward_examples": "counted_forward_examples",
    "off_clock_forward_examples": "off_clock_forward_examples",
    "children_cpu": "accumulated_children_cpu_time",
    "off_clock_cpu": "accumulated_off_clock_cpu_time",
    "off_clock_changes": "off_clock_changes",
}
"""What is evidence for a review (docs/fair_play.md), all of it accumulated since the trial began: seconds that the
judge saw pass while the training clock ran, and CPU seconds that the submission's process took meanwhile; examples of
the forward passes that a hook on the model saw, and of those while the clock stood; CPU seconds of the processes that
the submission started; CPU seconds of its own process while the clock stood; how often weights or buffers changed
meanwhile. Records of before there was evidence lack them."""
REVIEW_COLUMNS = {
    "submission_time": "accumulated_submission_time",
    "evaluation": "accumulated_eval_time",
    "logging": "accumulated_logging_time",
    "total": "total_duration",
    "build": "accumulated_build_time",
    "compile": "accumulated_compile_time",
    "averaging": "accumulated_averaging_time",
    "data_wait": "accumulated_data_wait_time",
    "cpu": "accumulated_cpu_time",
    "train_loss": "train/loss",
    "update_steps": "update_steps",
    "examples": "examples",
    "forward_examples": "forward_examples",
    "backward_examples": "backward_examples",
    **EVIDENCE_COLUMNS,
}
"""What a review (harness/review) reads besides seconds, steps and the metric, by the name it has there."""
NO_ROWS = "missing: the file has no rows"
_BLOCK_BYTES = 8 << 20
"""Of text that Arrow parses at a time."""
NULLS = ["", "nan", "NaN", "NA", "None", "null", "-nan"]
"""Cells that mean: no number."""


@dataclass(frozen=True)
class Evaluations:
    """Every evaluation of every trial, in order: arrays float [rows], NaN where a cell is empty or unusable."""

    trial: NDArray[np.int64]
    """The number that the caller gave the trial, ascending: int [rows]."""
    seconds: Array
    """On the training clock."""
    steps: Array
    """Nominal."""
    value: Array
    """Of the metric that the trial's target is about."""
    further: dict[str, Array]

    def rows_of(self, trial: int) -> slice:
        """The rows of one trial."""
        return slice(*np.searchsorted(self.trial, [trial, trial + 1]))


@dataclass
class Parsed:
    """What `parse_evaluations` returns."""

    rows: Evaluations
    refused: dict[int, str] = field(default_factory=dict)
    """Trials whose file cannot be used, and why."""
    repaired: dict[int, str] = field(default_factory=dict)
    """Trials of whose file a part was ignored, and what."""


def read_evaluations(path: Path, column: str, further: Mapping[str, str] | None = None) -> Evaluations | None:
    """The rows of one trial's file, with 0 as its number; None if the file is absent, has no rows or is refused.

    column: the metric, for example `validation/loss`. further: other columns to read, by the name to give them.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return read_evaluations_of(content, column, further)


def read_evaluations_of(content: bytes, column: str, further: Mapping[str, str] | None = None) -> Evaluations | None:
    """As `read_evaluations`, from the content of the file."""
    parsed = parse_evaluations({0: content}, {0: column}, further or {})
    return None if parsed.refused else parsed.rows


def parse_evaluations(
    contents: Mapping[int, bytes], columns: Mapping[int, str], further: Mapping[str, str] = FURTHER_COLUMNS
) -> Parsed:
    """The rows of many files, by the number of their trial.

    contents: the files. columns: the metric of each, for example `validation/loss`. further: other columns to read
    where a file has them, by the name to give them.

    A row with too few or too many cells, or whose time or step is no number, keeps its place and loses its values, so
    that the index of an evaluation stays that of its row.
    """
    parser = _Parser(further)
    groups: dict[tuple[bytes, str], list[int]] = defaultdict(list)
    for trial, content in contents.items():
        # Rows are counted by \n, so there must be no other end of a line.
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        header, _, body = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        if not body.strip():
            parser.refused[trial] = NO_ROWS
            continue
        # A file that was cut off in its last row must not run on into the next one when they are joined.
        parser.bodies[trial] = body if body.endswith(b"\n") else body + b"\n"
        groups[header, columns[trial]].append(trial)
    for (header, metric), trials in groups.items():
        parser.parse_group(trials, _split_header(header), metric)
    return Parsed(parser.joined(), parser.refused, parser.repaired)


def _split_header(raw: bytes) -> list[str]:
    text = raw.decode("utf-8", errors="replace")
    try:
        return [name.strip() for name in next(csv.reader([text]), [])]
    except csv.Error:
        return []


@dataclass
class _Piece:
    """Columns of some trials that were parsed together."""

    trials: list[int]
    counts: list[int]
    """Rows of each."""
    columns: dict[str, Array]


class _Parser:
    """Parses groups of files that share a header, and collects what came of them."""

    def __init__(self, further: Mapping[str, str]) -> None:
        self.further = further
        self.bodies: dict[int, bytes] = {}
        self.pieces: list[_Piece] = []
        self.refused: dict[int, str] = {}
        self.repaired: dict[int, str] = {}

    def parse_group(self, trials: list[int], header: list[str], metric: str) -> None:
        """Parse the bodies of `trials`, which all have this header."""
        time = next((name for name in TIME_COLUMNS if name in header), TIME_COLUMNS[0])
        wanted = {"value": metric, "steps": "global_step", "seconds": time}
        missing = [name for name in wanted.values() if name not in header]
        if missing or len(set(header)) < len(header):
            reason = f"no column {', '.join(missing)}" if missing else "a column is there twice"
            self.refused |= dict.fromkeys(trials, f"refused: {reason}")
            return
        wanted |= {key: name for key, name in self.further.items() if name in header}
        self._parse_or_halve(trials, header, wanted)

    def _parse_or_halve(self, trials: list[int], header: list[str], wanted: dict[str, str]) -> None:
        counts = [self.bodies[trial].count(b"\n") for trial in trials]
        columns = _parse_with_arrow([self.bodies[trial] for trial in trials], header, wanted, sum(counts))
        if columns is not None:
            self.pieces.append(_Piece(trials, counts, columns))
        elif len(trials) > 1:
            # A few of them are not clean; halving finds them in few passes.
            half = len(trials) // 2
            self._parse_or_halve(trials[:half], header, wanted)
            self._parse_or_halve(trials[half:], header, wanted)
        else:
            self._parse_cell_by_cell(trials[0], header, wanted)

    def _parse_cell_by_cell(self, trial: int, header: list[str], wanted: dict[str, str]) -> None:
        """Parse a file that is no clean table of numbers: what can be read is kept, and the rest is reported."""
        body = self.bodies[trial]
        if b"\0" in body:
            self.refused[trial] = "refused: a binary file"
            return
        # A byte that is no UTF-8 becomes a character that no number has, so its cell is found to hold none.
        lines = body.decode("utf-8", errors="replace").split("\n")
        # Empty lines at the end are no rows with too few cells.
        while lines and not lines[-1].strip():
            lines.pop()
        try:
            rows = list(csv.reader(lines))
        except csv.Error as error:
            self.refused[trial] = f"refused: not a CSV file ({error})"
            return
        columns, bad_cells = _read_cells(rows, header, wanted)
        if not np.isfinite(columns["seconds"]).any():
            self.refused[trial] = "refused: no row with a time"
            return
        ragged = sum(len(row) != len(header) for row in rows)
        notes = [f"{ragged} rows with too few or too many cells"] * bool(ragged)
        notes += [f"{bad_cells} cells without a number"] * bool(bad_cells)
        self.pieces.append(_Piece([trial], [len(rows)], columns))
        self.repaired[trial] = "repaired: ignored " + (" and ".join(notes) or "quotes and empty lines")

    def joined(self) -> Evaluations:
        """All pieces in the order of the trials; rows without a time and a step from 0 on lose their values."""
        trial = np.concatenate([np.repeat(p.trials, p.counts) for p in self.pieces] or [np.empty(0, int)])
        # Stable, so that the rows of a trial stay in the order of its file.
        order = np.argsort(trial, kind="stable")

        def column(key: str) -> Array:
            """One column of all pieces in the order of the trials; NaN for a piece without it."""
            parts = [p.columns.get(key, np.full(sum(p.counts), np.nan)) for p in self.pieces]
            return np.concatenate(parts or [np.empty(0)])[order]

        trial = trial[order]
        seconds, steps, value = column("seconds"), column("steps"), column("value")
        usable = np.isfinite(seconds) & (seconds >= 0) & np.isfinite(steps) & (steps >= 0)
        lost, counts = np.unique(trial[~usable], return_counts=True)
        for i, count in zip(lost.tolist(), counts.tolist(), strict=True):
            self.repaired.setdefault(i, f"repaired: ignored {count} rows whose time or step is no number from 0 on")
        # Added to a column, this makes NaN of all its unusable rows.
        blank = np.where(usable, 0.0, np.nan)
        further = {key: column(key) for key in self.further}
        return Evaluations(trial, seconds + blank, steps + blank, value + blank, further)


def _parse_with_arrow(
    bodies: list[bytes], header: list[str], wanted: dict[str, str], row_count: int
) -> dict[str, Array] | None:
    """The columns, or None where a file is not a clean table of numbers."""
    text = b"".join(bodies)
    # The files of a group are one text here. A quote without its partner would run on into the next file, so files with
    # quotes are left to the other parser, one by one.
    if b'"' in text or b"\0" in text:
        return None
    names = list(wanted.values())
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(text),
            # Threads share the blocks. One block needs none.
            read_options=pa.csv.ReadOptions(
                column_names=header, block_size=_BLOCK_BYTES, use_threads=len(text) > _BLOCK_BYTES
            ),
            parse_options=pa.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            convert_options=pa.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.float64()), null_values=NULLS
            ),
        )
    except (pa.ArrowException, UnicodeError):
        return None
    # The columns are cut into trials by these counts.
    if table.num_rows != row_count:
        return None
    return {key: table[name].to_numpy() for key, name in wanted.items()}


def _read_cells(rows: list[list[str]], header: list[str], wanted: dict[str, str]) -> tuple[dict[str, Array], int]:
    """The columns, and how many cells hold no number. A row with such a cell, or of another length, stays NaN."""
    position = {key: header.index(name) for key, name in wanted.items()}
    columns = {key: np.full(len(rows), np.nan) for key in wanted}
    bad_cells = 0
    for i, row in enumerate(rows):
        if len(row) != len(header):
            continue
        cells = {key: _number(row[place]) for key, place in position.items()}
        bad_in_row = sum(number is None for number in cells.values())
        bad_cells += bad_in_row
        if not bad_in_row:
            for key, number in cells.items():
                columns[key][i] = number
    return columns, bad_cells


def _number(cell: str) -> float | None:
    """The number in a cell, NaN for an empty one; None where it is no number, and its whole row not to be trusted."""
    cell = cell.strip()
    if cell in NULLS:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None
