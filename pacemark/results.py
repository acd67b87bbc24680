"""Results as DataFrames, for notebooks and other programs.

    import pacemark
    trials = pacemark.load_records("results/records")
    curves = pacemark.load_curves("results/records")
    curves[curves.submission == "lion"].groupby("step")["validation/loss"].median().plot()

Every function raises `harness.errors.UserError`, whose text says what is wrong and what to do.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from harness.config.choices import list_choices
from harness.errors import UserError
from harness.records.manifest import Manifest
from harness.review.settings import MIXABLE
from harness.scoring import leaderboard
from harness.scoring import load_records as loading
from harness.scoring.timings import read_timings

Folders = str | Path | Iterable[str | Path]
_TRIAL_KEYS = ["submission", "workload", "study", "trial"]


def load_records(records: Folders, *, scale: str | None = None, ruleset: str | None = None) -> pd.DataFrame:
    """One row per trial below a folder of records, or several.

    - submission, workload, study, trial, status; disturbed;
    - target, seconds and steps to it (NaN if it was not met), limit_seconds and limit_steps (how far the trial went),
      resolution_seconds and resolution_steps (since the evaluation before), crossing_share (how far between that
      evaluation and this one the interpolated metric meets the target, in (0, 1]), best and final value of the target's
      metric, examples, peak_memory_bytes, state_bytes_per_parameter, energy_joules;
    - hp.<name>: the hyperparameters that the algorithm was built with; schedule.<name>: its schedule; clip_norm;
    - machine, path. Seconds are of each trial's own clock, and compare only within a machine.

    scale, ruleset: which records to take where the folder holds several kinds. Trials that were refused have the status
    `invalid` or `missing`; `pacemark leaderboard` prints the reason for each.
    """
    loaded = _load(records, scale, ruleset, MIXABLE)
    table = loaded.trials.drop(columns=["framework", "index"])
    table.insert(5, "target", [loaded.targets.targets[workload].value for workload in table["workload"]])
    settings = pd.DataFrame(
        [_settings(loaded.manifests[i]) if i in loaded.manifests else {} for i in table.index], index=table.index
    )
    return table.join(settings)


def load_curves(records: Folders, *, scale: str | None = None, ruleset: str | None = None) -> pd.DataFrame:
    """One row per evaluation of every trial: submission, workload, study, trial, then step (nominal), seconds (of the
    trial's own training clock), and the metric of the trial's target, such as validation/loss, in a column of its name.

    scale, ruleset: as in `load_records`.
    """
    loaded = _load(records, scale, ruleset, MIXABLE)
    rows = loaded.rows
    curves = loaded.trials.loc[rows.trial, _TRIAL_KEYS].reset_index(drop=True)
    curves["step"], curves["seconds"] = rows.steps, rows.seconds
    metric = curves["workload"].map({name: target.column for name, target in loaded.targets.targets.items()})
    for name in sorted(metric.unique()):
        curves[name] = pd.Series(rows.value).where(metric == name)
    return curves


def score(
    records: Folders,
    *,
    timing: str | Path | None = None,
    scale: str | None = None,
    ruleset: str | None = None,
    baseline: str | None = None,
    mode: Literal["default", "algoperf"] = "default",
    mix_machines: bool = False,
    mix: Collection[str] = (),
) -> leaderboard.Leaderboard:
    """The leaderboard of the records: `scores`, `times`, `uncertainty` and `notes`, as in the files that
    `pacemark leaderboard` writes.

    timing: a file of `pacemark timing`; without one, clocks of several machines are refused unless mix_machines. mix:
    in what the records may differ all the same (precision, torch, ...). The other arguments are those of `pacemark
    leaderboard`.
    """
    loaded = _load(records, scale, ruleset, mix)
    timings = read_timings(Path(timing)) if timing is not None else None
    return leaderboard.score(
        loaded, mode=mode, baseline=baseline, timings=timings, mix_machines=mix_machines, ruleset=ruleset
    )


def list_submissions(pattern: str = "*") -> list[str]:
    """The submissions whose name matches, such as "*lion*": what `optimizer=` takes, sorted. Those of the folders in
    PACEMARK_CONFIG_DIR are among them."""
    return [name for name in list_choices("optimizer") if fnmatch.fnmatchcase(name, pattern) and name != "any"]


def _load(records: Folders, scale: str | None, ruleset: str | None, accepted: Collection[str] = ()) -> loading.Records:
    folders = [records] if isinstance(records, str | Path) else list(records)
    if not folders:
        raise UserError("records: no folder is given")
    return loading.load_records([Path(folder) for folder in folders], scale=scale, ruleset=ruleset, accepted=accepted)


def _settings(manifest: Manifest) -> dict[str, Any]:
    """What a tuner could set, by column."""
    schedule = manifest.config.get("schedule")
    return {
        **{f"hp.{name}": value for name, value in manifest.hyperparameters.items()},
        **({f"schedule.{name}": value for name, value in schedule.items()} if isinstance(schedule, dict) else {}),
        "clip_norm": manifest.optimizer.get("clip_norm"),
    }
