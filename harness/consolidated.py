"""Records as one table, a row per trial: what scoring needs of them, without their curves.

Small enough to commit where the records themselves are not, and quick to score again: `scripts/leaderboard.py
--consolidate trials.csv` writes one, and reads it in place of folders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from harness.evaluations import Evaluations
from harness.problems import UserError
from harness.reading import Problem, Records
from harness.targets import Targets

TEXT = ["submission", "workload", "status"]
WHOLE = ["study", "trial"]
NUMBERS = ["index", "seconds", "steps"]
"""At the target: evaluation index, seconds and nominal steps; empty where it was not met."""
OPTIONAL = [f"{what}_{unit}" for what in ("resolution", "limit") for unit in ("seconds", "steps")]
OPTIONAL += ["examples", "best", "final", "peak_memory_bytes", "data_wait_share", "build_seconds", "compile_seconds"]
OPTIONAL += ["state_bytes_per_parameter", "energy_joules"]


def write(records: Records, path: Path) -> None:
    columns = [*TEXT, *WHOLE, *NUMBERS, *OPTIONAL]
    table = records.trials[columns].dropna(axis="columns", how="all")
    table.to_csv(path, index=False, lineterminator="\n")


def read(path: Path, targets: Targets | None) -> Records:
    """UserError if `path` is not such a table, or without targets, which it does not hold."""
    if targets is None:
        raise UserError(f"{path} is a consolidated table, which holds no targets; give them with --targets")
    types = dict.fromkeys(TEXT, pa.string()) | dict.fromkeys(WHOLE, pa.int64())
    types |= dict.fromkeys([*NUMBERS, *OPTIONAL], pa.float64())
    try:
        table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types)).to_pandas()
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a table of trials: {error}") from error
    missing = [column for column in [*TEXT, *WHOLE, *NUMBERS] if column not in table]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; scripts/leaderboard.py --consolidate writes such a table"
        )
    table = table.reindex(columns=[*table.columns, *(c for c in OPTIONAL if c not in table)])
    problems: list[Problem] = []
    keep = table["workload"].isin(targets.targets)
    if not keep.all():
        problems.append(
            Problem(path.name, f"{int((~keep).sum())} trials not scored: no target is declared for their workload")
        )
    twice = table.duplicated(["submission", "workload", "study", "trial"])
    if twice.any():
        problems.append(Problem(path.name, f"{int(twice.sum())} trials left out: they stand there twice"))
    table = table[keep & ~twice].reset_index(drop=True)
    negative = (table[["index", "seconds", "steps"]] < 0).any(axis=1) | np.isneginf(table["seconds"])
    if negative.any():
        problems.append(Problem(path.name, f"{int(negative.sum())} trials refused: a negative time, step or index"))
        table.loc[negative, [*NUMBERS, "examples"]] = np.nan
        table.loc[negative, "status"] = "invalid"
    if table.empty:
        raise UserError(f"{path}: no trial of {', '.join(targets.scored)}")
    table[TEXT] = table[TEXT].astype(object)
    table = table.assign(framework="", machine=None, disturbed=False, path=path.name)
    empty = np.empty(0)
    return Records(table, Evaluations(np.empty(0, int), empty, empty, empty, {}), targets, problems)
