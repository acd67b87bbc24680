"""From trials to what a board is made of: the best trial of each study, medians over studies, and their intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.config.compose import shipped_ruleset
from harness.errors import UserError
from harness.records.manifest import Manifest
from harness.records.status import BROKEN_DOWN, Status
from harness.scoring import benchmark_score, uncertainty
from harness.scoring.targets import Targets
from harness.scoring.timings import Timings
from harness.scoring.uncertainty import Uncertainty

UNITS = ("seconds", "steps", "examples", "raw_seconds")
"""What times are measured in: seconds of the score, nominal steps, gradient examples, the trials' own clocks."""
CELL = ["submission", "workload"]
STUDY = [*CELL, "study"]
BEYOND_ALL_LIMITS = 10 * benchmark_score.TAU_MAX
"""Times the longest limit of a table: a ratio to the best time that scores nothing, whoever is best."""


@dataclass(frozen=True)
class StudyResults:
    """Times by study and their medians, in each of `UNITS`."""

    trials: pd.DataFrame
    """The rows of `timed_trials`."""
    studies: dict[str, pd.DataFrame]
    """The best trial of each study, as `benchmark_score.study_times` gives it."""
    medians: dict[str, pd.DataFrame]
    """Median over studies: a row per submission, a column per workload; infinite: missed, NaN: not run."""
    counted: dict[str, pd.DataFrame]
    """The same of base workloads, and infinite where a time gives no points (`benchmark_score.qualified`)."""

    @property
    def seconds(self) -> pd.DataFrame:
        """The medians that the board is scored by."""
        return self.medians["seconds"]


@dataclass(frozen=True)
class BoardIntervals:
    """The intervals of a board."""

    seconds: Uncertainty
    steps: Uncertainty
    details: pd.DataFrame
    """The studies that `seconds` is estimated from, as `study_details` gives them."""
    scores: pd.DataFrame
    """By submission: low, high of the score in seconds, with the rules for held-out workloads."""


def timed_trials(
    trials: pd.DataFrame, timings: Timings | None, *, refuse_mixed_clocks: bool, interpolate: bool
) -> pd.DataFrame:
    """The trials without duplicates, and the seconds that a board is scored by.

    `seconds` of the trials' own clocks become `raw_seconds`. seconds, resolution, limit and budget are those of
    `timings`, or without it of the clocks. interpolate: take seconds, steps and examples at the interpolated crossing,
    where there is one (column `interpolated`), instead of at the evaluation that met the target; raw_seconds stay those
    of the evaluation. Raises UserError for clocks of several machines with refuse_mixed_clocks, and what
    `Timings.apply` raises.
    """
    # A duplicate repeats a trial that is counted already, and its row has no times.
    trials = trials[trials["status"] != Status.DUPLICATE]
    trials = trials.assign(raw_seconds=trials["seconds"], interpolated=interpolate & trials["crossing_share"].notna())
    trials = _at_crossing(trials)
    if timings is not None:
        return timings.apply(trials)
    machines = sorted(trials["machine"].dropna().unique())
    if refuse_mixed_clocks and len(machines) > 1:
        raise UserError(
            f"the records are of {len(machines)} machines ({', '.join(machines)}), whose clocks do not compare; give "
            "--timing FILE for seconds of one machine (scripts/timing.py makes it), or --mix-machines to take the "
            "clocks as they are, with a column of seconds for each machine"
        )
    return trials.assign(
        resolution=trials["resolution_seconds"],
        limit=trials["limit_seconds"],
        # Each trial was timed by itself, so there is no error that they share.
        timing_error=0.0,
        timing_dof=1.0,
        # Records do not say how many seconds a trial could have trained, so the longest of its workload stands in.
        budget=trials.groupby("workload")["limit_seconds"].transform("max"),
    )


def _at_crossing(trials: pd.DataFrame) -> pd.DataFrame:
    """`trials` with the seconds, steps and examples of the interpolated ones at their crossing
    (docs/statistics.md, eq. 8b)."""
    # What lies between the crossing and the evaluation; 0 for the others.
    rest = (1 - trials["crossing_share"]).where(trials["interpolated"], 0.0)
    steps = trials["steps"] - (rest * trials["resolution_steps"]).where(trials["interpolated"], 0.0)
    seconds = trials["seconds"] - (rest * trials["resolution_seconds"]).where(trials["interpolated"], 0.0)
    # Examples go with the steps.
    examples = trials["examples"] * (steps / trials["steps"]).where(trials["interpolated"], 1.0)
    return trials.assign(seconds=seconds, steps=steps, examples=examples)


def with_absent_studies(trials: pd.DataFrame, manifests: Mapping[int, Manifest]) -> pd.DataFrame:
    """`trials` and a trial 0, which is missing, for each study that a submission lacks on a workload.

    A submission has as many studies as its ruleset asks for, or where nobody has so many, as the one that has most: who
    left out the bad ones must not be scored by the good ones. manifests: of the trials, by their row label.
    """
    shipped = [shipped_ruleset(name) for name in {manifests[i].ruleset for i in trials.index if i in manifests}]
    asked = max((rules.studies for rules in shipped if rules is not None), default=1)
    present: dict[tuple[str, str], set[int]] = {}
    for submission, workload, study in trials[STUDY].drop_duplicates().itertuples(index=False, name=None):
        present.setdefault((submission, workload), set()).add(study)
    most: dict[str, int] = {}
    for (_, workload), studies in present.items():
        most[workload] = max(most.get(workload, 0), min(asked, len(studies)))
    added = []
    for (submission, workload), studies in present.items():
        # Numbers that no study has: which ones are absent is not known.
        free = (number for number in itertools.count() if number not in studies)
        for number in itertools.islice(free, max(0, most[workload] - len(studies))):
            added.append((submission, workload, number, 0, str(Status.MISSING)))
    if not added:
        return trials
    first = int(trials.index.max()) + 1
    absent = pd.DataFrame(added, columns=[*STUDY, "trial", "status"], index=range(first, first + len(added)))
    absent = absent.reindex(columns=trials.columns).assign(framework="", path="", disturbed=False)
    return pd.concat([trials, absent.astype(trials.dtypes.to_dict())])


def study_results(trials: pd.DataFrame, targets: Targets, *, by_index: bool) -> StudyResults:
    """Best trials of the studies and their medians, of the rows of `timed_trials`, in each of `UNITS`.

    by_index: choose the best trial of a study as AlgoPerf does.
    """
    studies = {unit: benchmark_score.study_times(trials, unit, by_index=by_index) for unit in UNITS}
    medians = {unit: benchmark_score.times_to_target(table, unit) for unit, table in studies.items()}
    counted = {unit: benchmark_score.qualified(table, targets) for unit, table in medians.items()}
    return StudyResults(trials, studies, medians, counted)


def study_details(results: StudyResults, unit: str, targets: Targets) -> pd.DataFrame:
    """The table that `uncertainty.estimate` takes, in seconds or steps: a row per study of a base workload.

    Columns: submission, workload, study, time (infinite: missed), resolution, interpolated, budget, limit, and in
    seconds timing_error and timing_dof (`Timings.apply`).
    """
    trials, studies = results.trials, results.studies[unit]
    if unit == "steps":
        resolution, limit = trials["resolution_steps"], trials["limit_steps"]
        budget = trials.groupby("workload")["limit_steps"].transform("max")
    else:
        resolution, limit, budget = trials["resolution"], trials["limit"], trials["budget"]
    # A trial that broke down does not shorten how long its study has tried. Where all of a study broke down, the study
    # has failed for as long as any trial of the workload went on.
    lasting = limit.where(~trials["status"].isin(BROKEN_DOWN))
    shortest = lasting.groupby([trials[key] for key in STUDY]).min().rename("limit")
    details = studies.rename(columns={unit: "time"}).assign(
        resolution=resolution.loc[studies["row"]].to_numpy(),
        interpolated=trials.loc[studies["row"], "interpolated"].to_numpy(),
        budget=budget.loc[studies["row"]].to_numpy(),
    )
    if unit != "steps":
        shared = ["timing_error", "timing_dof"]
        details = details.assign(**{name: trials.loc[studies["row"], name].to_numpy() for name in shared})
    details = details.join(shortest, on=STUDY).drop(columns="row")
    details["limit"] = details["limit"].fillna(details["budget"])
    return details[details["workload"].isin(targets.base)].reset_index(drop=True)


def board_intervals(results: StudyResults, targets: Targets, baseline: str | None) -> BoardIntervals:
    """Intervals in seconds and in steps. Held-out workloads enter those of the score alone."""
    details = study_details(results, "seconds", targets)
    seconds = uncertainty.estimate(details, baseline=baseline)
    failed = benchmark_score.disqualified(results.seconds, targets)
    scores = seconds.scores
    # The scores alone follow the rules for held-out workloads; times, ranks and speed-ups do not.
    if failed.to_numpy().any():
        scores = uncertainty.estimate(_miss_disqualified(details, failed), baseline=baseline).scores
    steps = uncertainty.estimate(study_details(results, "steps", targets), baseline=baseline)
    return BoardIntervals(seconds, steps, details, scores)


def _miss_disqualified(details: pd.DataFrame, failed: pd.DataFrame) -> pd.DataFrame:
    """The same table with every study of a disqualified cell missed, and censored far beyond every budget.

    failed: bool, a row per submission, a column per base workload.
    """
    cells = [(submission, workload) for workload in failed for submission in failed.index[failed[workload]]]
    is_failed = pd.MultiIndex.from_frame(details[CELL]).isin(cells)
    return details.assign(
        time=details["time"].mask(is_failed, np.inf),
        limit=details["limit"].mask(is_failed, BEYOND_ALL_LIMITS * details["limit"].max()),
        resolution=details["resolution"].mask(is_failed),
    )
