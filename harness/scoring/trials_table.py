"""Records as one file: a table with a row per trial, with what scoring needs of them and without their curves.

Small enough to commit where the records themselves are not, and quick to score again: `scripts/leaderboard.py
--consolidate trials.csv` writes one, and reads it in place of folders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from harness.errors import UserError
from harness.records.evaluations import Evaluations
from harness.records.status import Status
from harness.records.trial_folders import Problem
from harness.scoring.load_records import Records
from harness.scoring.targets import Targets

TEXTS = ["submission", "workload", "status"]
INTEGERS = ["study", "trial"]
AT_TARGET = ["index", "seconds", "steps"]
"""Evaluation index, seconds and nominal steps; empty where the target was not met."""
OPTIONAL = [f"{figure}_{unit}" for figure in ("resolution", "limit") for unit in ("seconds", "steps")]
OPTIONAL += ["examples", "best", "final", "peak_memory_bytes", "data_wait_share", "build_seconds", "compile_seconds"]
OPTIONAL += ["state_bytes_per_parameter", "energy_joules", "crossing_share"]
"""Columns that a table may leave out."""


def write_trials_table(records: Records, path: Path) -> None:
    """Write the trials of `records`, one per row, without columns that are empty. Raises OSError.

    Machines, paths and manifests are not in it.
    """
    columns = [*TEXTS, *INTEGERS, *AT_TARGET, *OPTIONAL]
    table = records.trials[columns].dropna(axis="columns", how="all")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, lineterminator="\n")


def read_trials_table(path: Path, targets: Targets | None) -> Records:
    """Read such a table, as records without evaluations and manifests.

    Raises UserError if `path` is not such a table, if it has no trial of `targets`, and without `targets`, since the
    table itself holds none.
    """
    if targets is None:
        raise UserError(f"{path} is a table of trials, which holds no targets; give them with --targets")
    table = _read_csv(path)
    problems: list[Problem] = []
    has_target = table["workload"].isin(targets.targets)
    if not has_target.all():
        count = int((~has_target).sum())
        problems.append(Problem(path.name, f"{count} trials not scored: no target is declared for their workload"))
    repeated = table.duplicated(["submission", "workload", "study", "trial"])
    if repeated.any():
        problems.append(Problem(path.name, f"{int(repeated.sum())} trials left out: they are there twice"))
    table = table[has_target & ~repeated].reset_index(drop=True)
    negative = (table[AT_TARGET] < 0).any(axis=1) | np.isneginf(table["seconds"])
    if negative.any():
        problems.append(Problem(path.name, f"{int(negative.sum())} trials refused: a negative time, step or index"))
        table.loc[negative, [*AT_TARGET, "examples"]] = np.nan
        table.loc[negative, "status"] = str(Status.INVALID)
    if table.empty:
        raise UserError(f"{path}: no trial of {', '.join(targets.scored)}")
    table[TEXTS] = table[TEXTS].astype(object)
    # No machine: a table of several machines' clocks cannot be told from one of a single machine.
    table = table.assign(framework="", machine=None, disturbed=False, path=path.name)
    empty = np.empty(0)
    return Records(table, Evaluations(np.empty(0, int), empty, empty, empty, {}), targets, problems)


def _read_csv(path: Path) -> pd.DataFrame:
    """The table with every column of `OPTIONAL`; raises UserError if one of the other columns is missing."""
    # Given and not inferred: a submission can be called 001 or nan.
    types = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(INTEGERS, pa.int64())
    types |= dict.fromkeys([*AT_TARGET, *OPTIONAL], pa.float64())
    try:
        table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types)).to_pandas()
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a table of trials: {error}") from error
    missing = [column for column in [*TEXTS, *INTEGERS, *AT_TARGET] if column not in table]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; scripts/leaderboard.py --consolidate writes such a table"
        )
    # Scoring reads every column; what the table left out is unknown.
    return table.reindex(columns=[*table.columns, *(c for c in OPTIONAL if c not in table)])
