"""The procedure of a ruleset that confirms: tune once, then measure the winner on fresh seeds.

1. tuning      the points of the search space on one seed, or the records of another ruleset's study
2. finalists   the best of them on three other seeds; the winner has the least mean cost there
3. confirmed   the winner on further seeds, which alone make the score

The cost of a trial is the share of the budget at which it meets the target, by the interpolated crossing; of a miss, 1
plus the distance of its best value from the target, relative to the target. The first stage does not choose the winner,
so the luck that made a point look good there is not in what chooses it, and the third chooses nothing, so what chose it
is not in the score.

Every stage is a job of the ledger: trials that are finished are read and not run again. Only the tuning may be pruned,
and there a trial goes on until as many others as become finalists were faster. What is stopped can be no finalist.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.config.compose import shipped_ruleset
from harness.config.confirmation import FINALIST_SEED, FRESH_SEED, finalist_ruleset, kept, tuning_ruleset
from harness.config.schema import Run
from harness.errors import UserError
from harness.records.evaluations import FURTHER_COLUMNS, read_evaluations
from harness.records.status import Status
from harness.scoring.crossings import find_crossings
from harness.scoring.power import detectable_difference, workload_noise
from harness.study import ledger
from harness.study.executors import Report
from harness.study.ledger import PlannedTrial

RunStage = Callable[[list[Run]], bool]
"""Runs the unfinished trials of these runs; False where some are left."""


@dataclass(frozen=True)
class PointCost:
    """A point of the tuning."""

    number: int
    """Of its trials in the later stages."""
    study: int
    cost: float
    """At most 1 where the target was met: the share of the budget."""


def check_confirmed(runs: Sequence[Run]) -> None:
    """Raise UserError for runs that no procedure confirms."""
    if any(run.ruleset.tuning is None for run in runs):
        raise UserError("ruleset: a sweep is of rulesets that confirm or of others, not of both; start two commands")
    for run in runs:
        name = run.ruleset.name
        if "seed" in run.overridden or "trial" in run.overridden:
            raise UserError(f"seed=, trial=: ruleset={name} has its own, so that nobody has seen them; leave both out")
        if run.ruleset.trials != 1 or run.ruleset.points != "search_space":
            raise UserError(f"ruleset.trials, ruleset.points: ruleset={name} has the winner alone; leave both out")
        if run.overwrite:
            raise UserError(
                f"overwrite=true: it would discard the tuning of ruleset={name} too; remove the folders of the stages, "
                "or take label=NAME"
            )
        if run.pruning == "futility":
            raise UserError(
                f"pruning=futility: it may stop a finalist of ruleset={name}; take pruning=exact, which stops none"
            )


def confirm(runs: Sequence[Run], machine: str, run_stage: RunStage, report: Report) -> list[Run] | None:
    """The runs of the last stage, after those before it; None where trials of these are left.

    machine: the machine's folder name. Raises UserError where no point of a submission trains.
    """
    if not run_stage([tuning_run(run) for run in runs]):
        return None
    finalists = {i: choose_finalists(run, read_tuning(run, machine)) for i, run in enumerate(runs)}
    for i, run in enumerate(runs):
        report(f"{_name(run)}: finalists are points {', '.join(map(str, finalists[i]))}")
    if not run_stage([of_point for i, run in enumerate(runs) for of_point in finalist_runs(run, finalists[i])]):
        return None
    confirmed = []
    for i, run in enumerate(runs):
        costs = {number: finalist_cost(run, number, machine) for number in finalists[i]}
        winner = min(costs, key=lambda number: (costs[number], finalists[i].index(number)))
        listed = ", ".join(f"{number} {cost:.3f}" for number, cost in costs.items())
        report(f"{_name(run)}: point {winner} is confirmed (mean costs on other seeds: {listed})")
        confirmed.append(fresh_run(run, winner))
    return confirmed


def power_sentence(runs: Sequence[Run]) -> str:
    """What differences the runs will find, for the reader of a command that starts them."""
    of_workload = {run.spec.full_name: run.spec for run in runs}
    noises = [workload_noise(spec.target_provenance, spec.eval_every, spec.max_steps) for spec in of_workload.values()]
    seeds = min(run.ruleset.studies for run in runs)
    percent = 100 * (detectable_difference(noises, seeds) - 1)
    return (
        f"These {seeds} seeds on {', '.join(of_workload)} will find differences in time of {percent:.1f}% or more, in "
        "four cases of five; python scripts/confirm.py power says how many seeds another difference needs."
    )


# ---- the runs of the stages ----------------------------------------------------------------------------------------


def tuning_run(run: Run) -> Run:
    """The first stage of a run."""
    tuning = run.ruleset.tuning
    assert tuning is not None
    rules = tuning_ruleset(run.ruleset, shipped_ruleset)
    return run.model_copy(update={"ruleset": rules, "seed": tuning.seed, "label": run.submission_label})


def finalist_runs(run: Run, numbers: Sequence[int]) -> list[Run]:
    """The second stage, a run for each point."""
    of_stage = {"ruleset": finalist_ruleset(run.ruleset), "seed": FINALIST_SEED}
    return [_at_point(run, number).model_copy(update=of_stage) for number in numbers]


def fresh_run(run: Run, number: int) -> Run:
    """The third stage."""
    return _at_point(run, number).model_copy(update={"seed": FRESH_SEED})


def _at_point(run: Run, number: int) -> Run:
    # With `trial` in it, the run asks for that trial of each study alone.
    overridden = (*run.overridden, "trial")
    # A study of one point has no trial that another could stop.
    update = {"trial": number, "overridden": overridden, "pruning": "none", "label": run.submission_label}
    return run.model_copy(update=update)


# ---- choosing ------------------------------------------------------------------------------------------------------


def read_tuning(run: Run, machine: str) -> list[PointCost]:
    """The points of the tuning, by their number."""
    tuning = run.ruleset.tuning
    assert tuning is not None
    points = []
    for trial in ledger.enumerate_trials([tuning_run(run)], machine):
        study = trial.path.study - tuning.seed
        points.append(PointCost(study * tuning.trials + trial.path.trial, study, trial_cost(trial)))
    return sorted(points, key=lambda point: point.number)


def choose_finalists(run: Run, points: Sequence[PointCost]) -> list[int]:
    """The numbers of the best points, the best first: equally many of each study. Raises UserError where none trains.

    Of points with the same cost the earlier one is taken.
    """
    tuning = run.ruleset.tuning
    assert tuning is not None
    chosen: list[PointCost] = []
    for study in range(tuning.studies):
        of_study = [point for point in points if point.study == study and math.isfinite(point.cost)]
        chosen += sorted(of_study, key=lambda point: (point.cost, point.number))[: kept(run.ruleset)]
    if not chosen:
        raise UserError(f"{_name(run)}: no point of its tuning trains, so there is none to confirm; widen search_space")
    chosen.sort(key=lambda point: (point.cost, point.number))
    return [point.number for point in chosen[: tuning.finalists]]


def finalist_cost(run: Run, number: int, machine: str) -> float:
    """The mean cost of a finalist over its seeds."""
    (of_point,) = finalist_runs(run, [number])
    return statistics.fmean(trial_cost(trial) for trial in ledger.enumerate_trials([of_point], machine))


def trial_cost(trial: PlannedTrial) -> float:
    """The cost of a trial that is over; infinite where it broke down, or was pruned, as no finalist is."""
    spec = trial.run.spec
    state = ledger.read_state(trial)
    rows = read_evaluations(trial.path.evaluations, f"validation/{spec.metric}", FURTHER_COLUMNS)
    if rows is None or not state.is_over:
        return math.inf
    crossings = find_crossings(rows, np.array([spec.target]), np.array([spec.direction == "min"]))
    if np.isfinite(crossings.steps[0]):
        # docs/statistics.md, eq. 8b; without an evaluation before, the time is that of the evaluation.
        rest = 0.0 if np.isnan(crossings.crossing_share[0]) else 1 - crossings.crossing_share[0]
        return float(crossings.steps[0] - rest * crossings.resolution_steps[0]) / spec.max_steps
    if state.name != Status.EXHAUSTED or not np.isfinite(crossings.best[0]):
        return math.inf
    return 1 + abs(float(crossings.best[0]) - spec.target) / abs(spec.target)


def _name(run: Run) -> str:
    return f"{run.submission_label} on {run.spec.full_name}"
