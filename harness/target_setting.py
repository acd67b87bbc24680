"""The procedure that measures a workload's target, and whether the workload is quiet enough to be an instrument.

After Dahl et al. 2023 (arXiv:2306.07179, section 4.2), with the horizon mended: runs and schedules of 0.75 of the
budget, so that the target can be reached well before its end.

1. grid       quasi-random points of each submission's search space, one seed each
2. finalists  the two best points on five other seeds; the target is the median of the better one's final values
3. confirm    the baseline, the better of AdamW's two best points on those five seeds, full budget, on thirty further
              seeds: at least 90% must reach the target or it is rejected, and for the workload to be an instrument all
              must, with a coefficient of variation of their steps-to-target of at most 5%. (Known from ten seeds, that
              figure would be uncertain by a quarter.)

A held-out variant takes the finalists of its base workload through step 2 alone, on seeds of its own: it is to be
judged by points that were chosen without it.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import chi2

from harness import executors, ledger, study
from harness.choices import BASE
from harness.config import Run, load
from harness.executors import Say
from harness.ledger import Entry
from harness.problems import UserError
from harness.record import differences
from harness.workload import Facts

LENGTH = 0.75
POINTS = 8
SUBMISSIONS: dict[str, list[str]] = {
    "heavy-ball": ["optimizer=sgd", "optimizer.hyperparameters.nesterov=false"],
    "nesterov": ["optimizer=sgd"],
    "adamw": ["optimizer=adamw"],
    "nadamw": ["optimizer=nadamw"],
}
BASELINE = "adamw"
FINALISTS = 2
# Of study.TARGET_SEEDS; 900000 to 900119 served the targets of version 1, 910200 and 910400 on earlier baselines.
GRID_SEED, FINALIST_SEED, CONFIRM_SEED, VARIANT_SEED = 910_000, 910_100, 910_500, 910_300
FINALIST_RUNS, CONFIRM_RUNS = 5, 30
HITS_NEEDED, LARGEST_VARIATION = 0.9, 0.05
TUNED = ["ruleset=external", "ruleset.studies=1", f"ruleset.trials={POINTS}", f"seed={GRID_SEED}"]


@dataclass(frozen=True)
class Point:
    """A trial of the grid."""

    submission: str
    run: Run

    @property
    def name(self) -> str:
        return f"{self.submission} {self.run.trial}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """To four digits."""
        found = {"warmup_fraction": self.run.schedule.warmup_fraction} | self.run.optimizer.recipe.hyperparameters
        return {key: _rounded(value) for key, value in found.items()}


@dataclass(frozen=True)
class Measured:
    target: float
    accepted: bool
    """Whether the target may be written."""
    quiet: bool | None
    """Whether the workload is an instrument; None of a held-out variant, which is not asked to be one."""
    provenance: dict[str, Any]

    @property
    def verdict(self) -> str:
        if not self.accepted:
            return "REJECTED: the baseline misses it too often"
        if self.quiet is None:
            return "the better finalist's median"
        return "accepted" if self.quiet else "accepted, but the workload is NOT quiet enough to be an instrument"


@dataclass(frozen=True)
class _Job:
    """The runs of one workload or variant, and where they go."""

    facts: Facts
    whole: list[str]
    """Arguments of a run over the whole budget."""
    short: list[str]
    """Of one over LENGTH of it."""
    machine: str
    say: Say

    @classmethod
    def of(cls, workload: str, scale: str, variant: str, arguments: Sequence[str], machine: str, say: Say) -> _Job:
        whole = [f"workload={workload}", f"scale={scale}", "run_to_end=true", *arguments]
        if variant != BASE:
            whole.append(f"variant={variant}")
        facts = load([*whole, "optimizer=adamw", "workload.target=0"]).facts
        # No target is known while it is being measured: one that no run can meet, so that the records do not depend
        # on it.
        whole += [f"workload.target={-1.0 if facts.direction == 'min' else 2.0}", "workload.target_version=1"]
        short = [*whole, f"workload.max_steps={round(LENGTH * facts.max_steps)}", "schedule.horizon_fraction=1.0"]
        return cls(facts, whole, short, machine, say)

    @property
    def sign(self) -> int:
        """Times this, smaller is better."""
        return 1 if self.facts.direction == "min" else -1

    def rank(self, value: float) -> float:
        """Smaller is better; a trial that diverged (NaN) is the worst."""
        return self.sign * value if value == value else float("inf")

    def median(self, values: Sequence[float]) -> float:
        """Of the ranks of `values`: smaller is better."""
        return statistics.median(map(self.rank, values))

    def tell(self, step: str, text: str) -> None:
        self.say(f"{self.facts.full_name} {step:10} {text}")


def measure(workload: str, scale: str, arguments: Sequence[str], machine: str, say: Say) -> Measured:
    """Run what is not finished of the procedure, and read the target off the records.

    arguments: further ones for every run, such as records= and executor.workers=.
    """
    job = _Job.of(workload, scale, BASE, arguments, machine, say)
    facts = job.facts
    runs = [load([*job.short, *TUNED, *own, f"label={name}"]) for name, own in SUBMISSIONS.items()]
    tried = [(Point(e.base.submission_label, e.run), _final(e, facts)) for e in _finish(runs, machine, say)]
    tried.sort(key=lambda pair: (job.rank(pair[1]), pair[0].name))
    for point, value in tried:
        job.tell("grid", f"{point.name:14} {value:.4f}  {_listed(point.hyperparameters)}")
    points = [point for point, _ in tried]
    finalists = points[:FINALISTS]
    baselines = [point for point in points if point.submission == BASELINE][:FINALISTS]
    finals = _finals(job, {point.name: point for point in [*finalists, *baselines]}, FINALIST_SEED)
    target, said = _target(job, finalists, finals, FINALIST_SEED)

    # One seed can flatter a point, so the baseline too is the better of two on five seeds.
    baseline = min(baselines, key=lambda point: job.median(finals[point.name]))
    whole = load([*job.whole, *TUNED, *SUBMISSIONS[BASELINE], f"label={BASELINE}"])
    run = study.trial_of(whole, GRID_SEED, baseline.run.trial)
    confirm = _again(Point(BASELINE, run), CONFIRM_SEED, CONFIRM_RUNS)
    entries = sorted(_finish([confirm], machine, say), key=lambda e: e.seed)
    curves = [_curve(e) for e in entries]
    steps = [_steps_to(curve, facts, target) for curve in curves]
    hits = [step for step in steps if step is not None]
    variation, between = _variation(hits)
    shares = [float(curve[-1]["accumulated_eval_time"]) / float(curve[-1]["total_duration"]) for curve in curves]
    quiet = len(hits) == len(steps) and variation <= LARGEST_VARIATION
    job.tell(
        "confirm",
        f"{len(hits)} of {len(steps)} reach {target}; steps-to-target {steps}, "
        f"mean {statistics.mean(hits) if hits else float('nan'):.0f}, "
        f"coefficient of variation {variation:.1%} (95% interval {between[0]:.1%} to {between[1]:.1%}); "
        f"evaluation {100 * statistics.median(shares):.0f}% of the wall time",
    )
    provenance = {
        "procedure": f"python scripts/set_targets.py {workload} --scale {scale}",
        "grid": {point.name: round(value, 4) for point, value in tried},
        "grid_seed": GRID_SEED,
        **said,
        "baselines": _told(job, baselines, finals),
        "baseline": baseline.name,
        "confirm_seeds": [CONFIRM_SEED, CONFIRM_SEED + CONFIRM_RUNS - 1],
        "steps_to_target": steps,
        "hits": f"{len(hits)}/{len(steps)}",
        "coefficient_of_variation": round(variation, 4),
        "coefficient_of_variation_interval": [round(end, 4) for end in between],
        "evaluations_to_target": statistics.median(hits) / facts.eval_every if hits else None,
        "evaluation_share_of_wall_time": round(statistics.median(shares), 2),
    }
    return Measured(target, len(hits) >= HITS_NEEDED * len(steps), quiet, provenance)


def measure_variant(
    workload: str, variant: str, scale: str, arguments: Sequence[str], machine: str, say: Say
) -> Measured:
    """The target of a held-out variant, by the finalists that the workload's own provenance names.

    UserError if it names none, or if a search space has changed since.
    """
    job = _Job.of(workload, scale, variant, arguments, machine, say)
    finalists = _finalists_of_base(job, workload, scale)
    finals = _finals(job, {point.name: point for point in finalists}, VARIANT_SEED)
    target, said = _target(job, finalists, finals, VARIANT_SEED)
    command = f"python scripts/set_targets.py {workload} --scale {scale} --variant {variant}"
    return Measured(target, True, None, {"procedure": command, **said})


def _finalists_of_base(job: _Job, workload: str, scale: str) -> list[Point]:
    base = load([f"workload={workload}", f"scale={scale}", "optimizer=adamw", "workload.target=0"])
    provenance = base.facts.target_provenance
    try:
        finalists = {name: entry["hyperparameters"] for name, entry in provenance["finalists"].items()}
        seed = provenance["grid_seed"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the target_provenance of workload={workload} at scale={scale} does not say which points were finalists, "
            f"and its variants need them; run `python scripts/set_targets.py {workload} --scale {scale} --write` first"
        ) from error
    points = []
    for name, hyperparameters in finalists.items():
        submission, _, trial = name.rpartition(" ")
        run = load([*job.short, *TUNED, *SUBMISSIONS[submission], f"label={submission}"])
        point = Point(submission, study.trial_of(run, seed, int(trial)))
        if changed := differences(hyperparameters, point.hyperparameters):
            raise UserError(
                f"the finalist {name} of workload={workload} is another point now ({'; '.join(changed)}): the search "
                f"space has changed; run `python scripts/set_targets.py {workload} --scale {scale} --write` first"
            )
        points.append(point)
    return points


def _finals(job: _Job, points: Mapping[str, Point], seed: int) -> dict[str, list[float]]:
    """Final values of each point on FINALIST_RUNS seeds from `seed` on."""
    runs = {name: _again(point, seed, FINALIST_RUNS) for name, point in points.items()}
    entries = _finish(list(runs.values()), job.machine, job.say)
    finals = {name: [_final(e, job.facts) for e in entries if e.base.label == run.label] for name, run in runs.items()}
    for name, values in finals.items():
        job.tell("finalist", f"{name:14} {' '.join(f'{value:.4f}' for value in values)}")
    return finals


def _target(
    job: _Job, finalists: Sequence[Point], finals: Mapping[str, list[float]], seed: int
) -> tuple[float, dict[str, Any]]:
    """The median of the better finalist, and what the provenance says of it."""
    winner = min(finalists, key=lambda point: job.median(finals[point.name])).name
    median = job.median(finals[winner])
    if median == float("inf"):
        raise UserError(
            f"{job.facts.full_name}: no finalist trains on most of the seeds {seed} to {seed + FINALIST_RUNS - 1}, so "
            "there is no target; make the workload easier to train"
        )
    return round(job.sign * median, 4), {
        "finalists": _told(job, finalists, finals),
        "finalist_seeds": [seed, seed + FINALIST_RUNS - 1],
        "winner": winner,
    }


def _told(job: _Job, points: Sequence[Point], finals: Mapping[str, list[float]]) -> dict[str, Any]:
    """Points with their final values for the provenance, the better one first."""
    return {
        point.name: {
            "hyperparameters": point.hyperparameters,
            "final_values": [round(value, 4) for value in finals[point.name]],
        }
        for point in sorted(points, key=lambda point: job.median(finals[point.name]))
    }


def _finish(runs: Sequence[Run], machine: str, say: Say) -> list[Entry]:
    entries = ledger.plan(runs, machine)
    executors.execute(entries, say)
    for entry in entries:
        state = ledger.state_of(entry)
        if state.name in ("failed", "out_of_memory"):
            raise UserError(f"{entry.name} ended as {state.name}; see {entry.folder / 'manifest.json'}")
    return entries


def _again(point: Point, seed: int, number: int) -> Run:
    """The run of `point` on `number` other seeds."""
    run = point.run
    ruleset = run.ruleset.model_copy(update={"studies": number, "trials": 1, "points": "recipe"})
    label = f"{point.submission}-{run.trial}"
    return run.model_copy(update={"ruleset": ruleset, "seed": seed, "trial": 1, "label": label, "overridden": ()})


def _curve(entry: Entry) -> list[dict[str, str]]:
    with (entry.folder / "eval_measurements.csv").open() as file:
        return list(csv.DictReader(file))


def _final(entry: Entry, facts: Facts) -> float:
    """The last value of the metric; NaN if the trial diverged."""
    status = json.loads((entry.folder / "manifest.json").read_text())["status"]
    return float("nan") if status == "diverged" else float(_curve(entry)[-1][f"validation/{facts.metric}"])


def _steps_to(curve: list[dict[str, str]], facts: Facts, target: float) -> int | None:
    met = facts.model_copy(update={"target": target}).meets_target
    return next((int(row["global_step"]) for row in curve if met(float(row[f"validation/{facts.metric}"]))), None)


def _variation(steps: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The coefficient of variation with its 95% interval, from the deviation's, as if `steps` were normal."""
    freedom = len(steps) - 1
    if freedom < 1:
        return float("nan"), (float("nan"), float("nan"))
    variation = statistics.stdev(steps) / statistics.mean(steps)
    low, high = (variation * (freedom / float(chi2.ppf(share, freedom))) ** 0.5 for share in (0.975, 0.025))
    return variation, (low, high)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def write(path: Path, measured: Measured) -> None:
    """Put target and provenance into the workload's YAML at `path`; everything else there stays as it is."""
    text = path.read_text().split("target_provenance:")[0].rstrip() + "\n"
    version = re.search(r"^target_version: (\d+)$", text, re.MULTILINE)
    before = re.search(r"^target: (.*)$", text, re.MULTILINE)
    if before is None or version is None:
        raise UserError(f"{path} has no line `target: ...` and `target_version: ...` to write to; add them")
    number = int(version[1])
    if before[1] not in (str(measured.target), "null", "???"):  # these two: not measured yet
        number += 1
    text = re.sub(r"^target: .*$", f"target: {measured.target}", text, flags=re.MULTILINE)
    text = re.sub(r"^target_version: .*$", f"target_version: {number}", text, flags=re.MULTILINE)
    path.write_text(
        text
        + yaml.safe_dump(
            {"target_provenance": measured.provenance}, default_flow_style=None, sort_keys=False, width=120
        )
    )
