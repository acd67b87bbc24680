"""The procedure that measures a workload's target, and whether the workload is quiet enough to be an instrument.

After Dahl et al. 2023 (arXiv:2306.07179, section 4.2), but with runs and schedules of 0.75 of the budget, so that the
target can be reached well before its end.

1. grid       quasi-random points of each submission's search space, one seed each
2. finalists  the two best points on five other seeds; the target is the median of the better one's final values
3. confirm    the baseline, which is the better of AdamW's two best points on those five seeds, over the full budget, on
              thirty further seeds. The target is rejected unless at least 90% reach it. The workload is an instrument
              only if all reach it, with a coefficient of variation of their steps-to-target of at most 5%.

A held-out variant takes the finalists of its base workload through step 2 alone, on seeds of its own, so that it is
judged by points that were chosen without it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import chi2

from harness.config.choices import BASE_VARIANT
from harness.config.compose import load_run
from harness.config.schema import Run
from harness.config.study_trials import configure_trial
from harness.errors import UserError
from harness.interface.workload import WorkloadSpec
from harness.records.differences import differences
from harness.records.evaluations import Evaluations, read_evaluations
from harness.records.status import CRASHED, Status
from harness.study import executors, ledger
from harness.study.executors import Report
from harness.study.ledger import PlannedTrial

SHORT_BUDGET = 0.75
"""Share of the budget over which points are compared and the target is taken, so that the target can be reached well
before the end of the budget."""
GRID_POINTS = 8
"""Of each submission."""
SUBMISSIONS: dict[str, list[str]] = {
    "heavy-ball": ["optimizer=sgd", "optimizer.hyperparameters.nesterov=false"],
    "nesterov": ["optimizer=sgd"],
    "adamw": ["optimizer=adamw"],
    "nadamw": ["optimizer=nadamw"],
}
BASELINE = "adamw"
FINALISTS = 2
# All in TARGET_SEEDS of harness/config/study_trials.py. 900000 to 900119 served the targets of version 1, and those
# from 910200 and 910400 on earlier baselines.
GRID_SEED, FINALIST_SEED, CONFIRM_SEED, VARIANT_SEED = 910_000, 910_100, 910_500, 910_300
# From ten confirmation runs the coefficient of variation would be uncertain by a quarter.
FINALIST_RUNS, CONFIRM_RUNS = 5, 30
HITS_NEEDED, LARGEST_VARIATION = 0.9, 0.05
# No judge: the submissions are Pacemark's own.
GRID = ["ruleset=external", "ruleset.studies=1", f"ruleset.trials={GRID_POINTS}", f"seed={GRID_SEED}", "judge=none"]
"""Arguments of the runs of the grid."""


@dataclass(frozen=True)
class Point:
    """A point of the grid: the trial that tried it."""

    submission: str
    """Key of SUBMISSIONS."""
    run: Run

    @property
    def name(self) -> str:
        """For provenance and messages: `adamw 3`."""
        return f"{self.submission} {self.run.trial}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The point's own values, to four digits."""
        values = {"warmup_fraction": self.run.schedule.warmup_fraction} | self.run.optimizer.recipe.hyperparameters
        return {key: _rounded(value) for key, value in values.items()}


@dataclass(frozen=True)
class MeasuredTarget:
    """The result of the procedure."""

    target: float
    accepted: bool
    """Whether the target may be written."""
    quiet: bool | None
    """Whether the workload is an instrument; None for a held-out variant, which need not be one."""
    provenance: dict[str, Any]
    """`target_provenance` of the workload's YAML."""

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        if not self.accepted:
            return "REJECTED: the baseline misses it too often"
        if self.quiet is None:
            return "the better finalist's median"
        return "accepted" if self.quiet else "accepted, but the workload is NOT quiet enough to be an instrument"


@dataclass(frozen=True)
class _Job:
    """The runs of one workload or variant, and where they go."""

    spec: WorkloadSpec
    full_budget: list[str]
    """Arguments of a run over the whole budget."""
    short_budget: list[str]
    """Arguments of a run over SHORT_BUDGET of it."""
    machine: str
    report: Report

    @classmethod
    def make(
        cls, workload: str, scale: str, variant: str, arguments: Sequence[str], machine: str, report: Report
    ) -> _Job:
        """The job of a workload or variant. arguments: further ones for every run."""
        full = [f"workload={workload}", f"scale={scale}", "run_to_end=true", *arguments]
        if variant != BASE_VARIANT:
            full.append(f"variant={variant}")
        # Any optimizer and any target make the configuration complete: the file may have no target yet.
        spec = load_run([*full, "optimizer=adamw", "workload.target=0"]).spec
        # A target that no run can meet, so that the records do not depend on it: losses are at least 0, accuracies at
        # most 1. For the same reason its version is fixed.
        full += [f"workload.target={-1.0 if spec.direction == 'min' else 2.0}", "workload.target_version=1"]
        steps = round(SHORT_BUDGET * spec.max_steps)
        # The schedule ends with the shortened budget, so that final values are those after the decay.
        short = [*full, f"workload.max_steps={steps}", "schedule.horizon_fraction=1.0"]
        return cls(spec, full, short, machine, report)

    @property
    def sign(self) -> int:
        """The factor that makes smaller values of the metric the better ones."""
        return 1 if self.spec.direction == "min" else -1

    def rank(self, value: float) -> float:
        """A number by which smaller is better; a trial that diverged (NaN) is the worst."""
        # NaN differs from itself.
        return self.sign * value if value == value else float("inf")

    def median_rank(self, values: Sequence[float]) -> float:
        """The median of the ranks of `values`."""
        return statistics.median(map(self.rank, values))

    def report_step(self, step: str, text: str) -> None:
        """Report a line of a step of the procedure."""
        self.report(f"{self.spec.full_name} {step:10} {text}")


def measure_target(workload: str, scale: str, arguments: Sequence[str], machine: str, report: Report) -> MeasuredTarget:
    """Run the unfinished part of the procedure, and read the target off the records.

    arguments: further ones for every run, such as records= and executor.workers=. machine: the machine's folder name.
    Raises UserError where a trial breaks down or no finalist trains.
    """
    job = _Job.make(workload, scale, BASE_VARIANT, arguments, machine, report)
    grid = _run_grid(job)
    points = [point for point, _ in grid]
    finalists = points[:FINALISTS]
    baselines = [point for point in points if point.submission == BASELINE][:FINALISTS]
    # By name, since a point that is both finalist and baseline runs once.
    finals = _final_values(job, {point.name: point for point in [*finalists, *baselines]}, FINALIST_SEED)
    target, target_provenance = _target_of_finalists(job, finalists, finals, FINALIST_SEED)
    # One seed can flatter a point, so the baseline too is the better of two on five seeds.
    baseline = min(baselines, key=lambda point: job.median_rank(finals[point.name]))
    confirmation = _confirm(job, baseline, target)
    provenance = {
        "procedure": f"python scripts/set_targets.py {workload} --scale {scale}",
        "grid": {point.name: round(value, 4) for point, value in grid},
        "grid_seed": GRID_SEED,
        **target_provenance,
        "baselines": _describe_points(job, baselines, finals),
        "baseline": baseline.name,
        "confirm_seeds": [CONFIRM_SEED, CONFIRM_SEED + CONFIRM_RUNS - 1],
        **confirmation.provenance(job.spec),
    }
    return MeasuredTarget(target, confirmation.accepted, confirmation.quiet, provenance)


def measure_variant_target(
    workload: str, variant: str, scale: str, arguments: Sequence[str], machine: str, report: Report
) -> MeasuredTarget:
    """The target of a held-out variant, by the finalists that the workload's own provenance names.

    Arguments as of `measure_target`. Raises UserError if it names none, or if a search space has changed since.
    """
    job = _Job.make(workload, scale, variant, arguments, machine, report)
    finalists = _finalists_of_base(job, workload, scale)
    finals = _final_values(job, {point.name: point for point in finalists}, VARIANT_SEED)
    target, target_provenance = _target_of_finalists(job, finalists, finals, VARIANT_SEED)
    command = f"python scripts/set_targets.py {workload} --scale {scale} --variant {variant}"
    return MeasuredTarget(target, True, None, {"procedure": command, **target_provenance})


# ---- the steps of the procedure ------------------------------------------------------------------------------------


def _run_grid(job: _Job) -> list[tuple[Point, float]]:
    """Every point of the grid with its final value, the best first."""
    runs = [
        load_run([*job.short_budget, *GRID, *arguments, f"label={name}"]) for name, arguments in SUBMISSIONS.items()
    ]
    grid = [
        # The label is the key of SUBMISSIONS, given above.
        (Point(trial.path.label, trial.run), _final_value(trial, job.spec))
        for trial in _run_all(runs, job.machine, job.report)
    ]
    grid.sort(key=lambda entry: (job.rank(entry[1]), entry[0].name))
    for point, value in grid:
        job.report_step("grid", f"{point.name:14} {value:.4f}  {_listed(point.hyperparameters)}")
    return grid


def _final_values(job: _Job, points: Mapping[str, Point], seed: int) -> dict[str, list[float]]:
    """Final values of each point on FINALIST_RUNS seeds from `seed` on."""
    runs = {name: _on_fresh_seeds(point, seed, FINALIST_RUNS) for name, point in points.items()}
    trials = _run_all(list(runs.values()), job.machine, job.report)
    finals = {
        name: [_final_value(trial, job.spec) for trial in trials if trial.path.label == run.label]
        for name, run in runs.items()
    }
    for name, values in finals.items():
        job.report_step("finalist", f"{name:14} {' '.join(f'{value:.4f}' for value in values)}")
    return finals


def _target_of_finalists(
    job: _Job, finalists: Sequence[Point], finals: Mapping[str, list[float]], seed: int
) -> tuple[float, dict[str, Any]]:
    """The median of the better finalist, and its provenance."""
    winner = min(finalists, key=lambda point: job.median_rank(finals[point.name])).name
    median = job.median_rank(finals[winner])
    # More than half of the seeds diverged.
    if median == float("inf"):
        raise UserError(
            f"{job.spec.full_name}: no finalist trains on most of the seeds {seed} to {seed + FINALIST_RUNS - 1}, so "
            "there is no target; make the workload easier to train"
        )
    return round(job.sign * median, 4), {
        "finalists": _describe_points(job, finalists, finals),
        "finalist_seeds": [seed, seed + FINALIST_RUNS - 1],
        "winner": winner,
    }


@dataclass(frozen=True)
class _Confirmation:
    """The baseline on fresh seeds."""

    steps: list[int | None]
    """Steps-to-target of each seed; None for a miss."""
    evaluation_share: float
    """Median share of the wall time that went into evaluations."""

    @property
    def hits(self) -> list[int]:
        """Steps-to-target of the seeds that reached the target."""
        return [step for step in self.steps if step is not None]

    @property
    def accepted(self) -> bool:
        """Whether enough seeds reached the target for it to be written."""
        return len(self.hits) >= HITS_NEEDED * len(self.steps)

    @property
    def quiet(self) -> bool:
        """Whether the workload is an instrument: all seeds reach the target, with little variation."""
        variation, _ = _coefficient_of_variation(self.hits)
        return len(self.hits) == len(self.steps) and variation <= LARGEST_VARIATION

    def provenance(self, spec: WorkloadSpec) -> dict[str, Any]:
        """The part of `target_provenance` that the confirmation adds."""
        hits = self.hits
        variation, interval = _coefficient_of_variation(hits)
        return {
            "steps_to_target": self.steps,
            "hits": f"{len(hits)}/{len(self.steps)}",
            "coefficient_of_variation": round(variation, 4),
            "coefficient_of_variation_interval": [round(end, 4) for end in interval],
            "evaluations_to_target": statistics.median(hits) / spec.eval_every if hits else None,
            "evaluation_share_of_wall_time": round(self.evaluation_share, 2),
        }


def _confirm(job: _Job, baseline: Point, target: float) -> _Confirmation:
    """Run the baseline over the full budget on fresh seeds, and report how many reach `target`."""
    study = load_run([*job.full_budget, *GRID, *SUBMISSIONS[BASELINE], f"label={BASELINE}"])
    # The same point of the search space, but in a study over the full budget.
    point = Point(BASELINE, configure_trial(study, GRID_SEED, baseline.run.trial))
    trials = _run_all([_on_fresh_seeds(point, CONFIRM_SEED, CONFIRM_RUNS)], job.machine, job.report)
    rows = [_read_rows(trial, job.spec) for trial in sorted(trials, key=lambda trial: trial.path.study)]
    shares = [float(r.further["evaluation"][-1]) / float(r.further["total"][-1]) for r in rows]
    confirmation = _Confirmation([_steps_to_target(r, job.spec, target) for r in rows], statistics.median(shares))
    hits = confirmation.hits
    variation, (low, high) = _coefficient_of_variation(hits)
    job.report_step(
        "confirm",
        f"{len(hits)} of {len(confirmation.steps)} reach {target}; steps-to-target {confirmation.steps}, "
        f"mean {statistics.mean(hits) if hits else float('nan'):.0f}, "
        f"coefficient of variation {variation:.1%} (95% interval {low:.1%} to {high:.1%}); "
        f"evaluation {100 * confirmation.evaluation_share:.0f}% of the wall time",
    )
    return confirmation


def _finalists_of_base(job: _Job, workload: str, scale: str) -> list[Point]:
    """The finalists that the provenance of the workload names, as points of the variant. Raises UserError if it names
    none, or if a search space has changed."""
    base = load_run([f"workload={workload}", f"scale={scale}", "optimizer=adamw", "workload.target=0"])
    provenance = base.spec.target_provenance
    procedure = f"python scripts/set_targets.py {workload} --scale {scale} --write"
    try:
        finalists = {name: entry["hyperparameters"] for name, entry in provenance["finalists"].items()}
        seed = provenance["grid_seed"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the target_provenance of workload={workload} at scale={scale} does not say which points were finalists, "
            f"and its variants need them; run `{procedure}` first"
        ) from error
    points = []
    for name, hyperparameters in finalists.items():
        submission, _, trial = name.rpartition(" ")
        study = load_run([*job.short_budget, *GRID, *SUBMISSIONS[submission], f"label={submission}"])
        point = Point(submission, configure_trial(study, seed, int(trial)))
        # The provenance has the values to four digits; the point itself comes from the present search space.
        if changed := differences(hyperparameters, point.hyperparameters):
            raise UserError(
                f"the finalist {name} of workload={workload} is another point now ({'; '.join(changed)}): the search "
                f"space has changed; run `{procedure}` first"
            )
        points.append(point)
    return points


def _describe_points(job: _Job, points: Sequence[Point], finals: Mapping[str, list[float]]) -> dict[str, Any]:
    """Points with their final values for the provenance, the better one first."""
    return {
        point.name: {
            "hyperparameters": point.hyperparameters,
            "final_values": [round(value, 4) for value in finals[point.name]],
        }
        for point in sorted(points, key=lambda point: job.median_rank(finals[point.name]))
    }


# ---- trials and their rows -----------------------------------------------------------------------------------------


def _run_all(runs: Sequence[Run], machine: str, report: Report) -> list[PlannedTrial]:
    """Run the unfinished ones of the trials that `runs` ask for; raises UserError where one breaks down."""
    trials = ledger.plan(runs, machine, report)
    executors.execute(trials, report)
    for trial in trials:
        state = ledger.read_state(trial)
        if state.name in CRASHED:
            raise UserError(f"{trial.name} ended as {state.name}; see {trial.path.manifest}")
    return trials


def _on_fresh_seeds(point: Point, seed: int, number: int) -> Run:
    """The run of `point` on `number` seeds from `seed` on."""
    run = point.run
    ruleset = run.ruleset.model_copy(update={"studies": number, "trials": 1, "points": "recipe"})
    # A label for each point gives it a folder of its own. overridden is emptied, since with `trial` in it only that
    # trial would be listed; points="recipe", since the run holds the point already.
    label = f"{point.submission}-{run.trial}"
    return run.model_copy(update={"ruleset": ruleset, "seed": seed, "trial": 1, "label": label, "overridden": ()})


def _read_rows(trial: PlannedTrial, spec: WorkloadSpec) -> Evaluations:
    further = {"evaluation": "accumulated_eval_time", "total": "total_duration"}
    rows = read_evaluations(trial.path.evaluations, f"validation/{spec.metric}", further)
    if rows is None:
        raise UserError(f"{trial.path.evaluations} cannot be read; move the folder away to run the trial again")
    return rows


def _final_value(trial: PlannedTrial, spec: WorkloadSpec) -> float:
    """The last value of the metric; NaN if the trial diverged."""
    if ledger.read_state(trial).name == Status.DIVERGED:
        return float("nan")
    return float(_read_rows(trial, spec).value[-1])


def _steps_to_target(rows: Evaluations, spec: WorkloadSpec, target: float) -> int | None:
    meets = spec.model_copy(update={"target": target}).meets_target
    # Recorded runs have a target that none meets, so the rows are compared with the measured one.
    steps_and_values = zip(rows.steps.tolist(), rows.value.tolist(), strict=True)
    return next((int(step) for step, value in steps_and_values if meets(value)), None)


def _coefficient_of_variation(steps: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """With its 95% interval, which is that of a normal sample's standard deviation; NaN below two values."""
    dof = len(steps) - 1
    if dof < 1:
        return float("nan"), (float("nan"), float("nan"))
    variation = statistics.stdev(steps) / statistics.mean(steps)
    low, high = (variation * (dof / float(chi2.ppf(share, dof))) ** 0.5 for share in (0.975, 0.025))
    return variation, (low, high)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def write_target(path: Path, measured: MeasuredTarget) -> None:
    """Write target and provenance into the workload's YAML at `path`; everything else in it stays as it is. Raises
    UserError where it has no lines for them."""
    # By lines and not through YAML, which would drop the comments. The provenance is the last key of the file.
    text = path.read_text().split("target_provenance:")[0].rstrip() + "\n"
    version = re.search(r"^target_version: (\d+)$", text, re.MULTILINE)
    before = re.search(r"^target: (.*)$", text, re.MULTILINE)
    if before is None or version is None:
        raise UserError(f"{path} has no line `target: ...` and `target_version: ...` to write to; add them")
    number = int(version[1])
    # The last two mean: not measured yet.
    if before[1] not in (str(measured.target), "null", "???"):
        number += 1
    text = re.sub(r"^target: .*$", f"target: {measured.target}", text, flags=re.MULTILINE)
    text = re.sub(r"^target_version: .*$", f"target_version: {number}", text, flags=re.MULTILINE)
    path.write_text(
        text
        + yaml.safe_dump(
            {"target_provenance": measured.provenance}, default_flow_style=None, sort_keys=False, width=120
        )
    )
