"""The procedure that measures a workload's target, and whether the workload is quiet enough to be an instrument.

After Dahl et al. 2023 (arXiv:2306.07179, section 4.2), with the horizon mended: runs and schedules of 0.75 of the
budget, so that the target can be reached well before its end.

1. grid       quasi-random points of each submission's search space, one seed each
2. finalists  the two best points on five other seeds; the target is the median of the better one's final values
3. confirm    the baseline, AdamW at its better finalist (or at the best of its points, if none is a finalist), full
              budget, ten further seeds: at least nine must reach the target or it is rejected, and for the workload to
              be an instrument all must, with a coefficient of variation of their steps-to-target of at most 5%

A held-out variant takes the finalists of its base workload through step 2 alone.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness import executors, ledger, study
from harness.config import Run, load
from harness.executors import Say
from harness.ledger import Entry
from harness.problems import UserError
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
# Of study.TARGET_SEEDS; 900000 to 900119 served the targets of version 1.
GRID_SEED, FINALIST_SEED, CONFIRM_SEED = 910_000, 910_100, 910_200
FINALIST_RUNS, CONFIRM_RUNS = 5, 10
HITS_NEEDED, LARGEST_VARIATION = 9, 0.05


@dataclass(frozen=True)
class Point:
    """A trial of the grid, and the final value of the metric there."""

    submission: str
    run: Run
    value: float

    @property
    def name(self) -> str:
        return f"{self.submission} {self.run.trial}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        found = self.run.optimizer.recipe.hyperparameters
        return {"warmup_fraction": self.run.schedule.warmup_fraction} | found


@dataclass(frozen=True)
class Measured:
    target: float
    accepted: bool
    """Whether the target may be written."""
    quiet: bool
    """Whether the workload is an instrument."""
    provenance: dict[str, Any]


def measure(workload: str, scale: str, arguments: Sequence[str], machine: str, say: Say) -> Measured:
    """Run what is not finished of the procedure, and read the target off the records.

    arguments: further ones for every run, such as records= and executor.workers=.
    """
    base = [f"workload={workload}", f"scale={scale}", "run_to_end=true", *arguments]
    facts = load([*base, "optimizer=adamw"]).facts
    # No target is known while it is being measured: one that no run can meet, so that the records do not depend on it.
    base += [f"workload.target={-1.0 if facts.direction == 'min' else 2.0}", "workload.target_version=1"]
    short = [*base, f"workload.max_steps={round(LENGTH * facts.max_steps)}", "schedule.horizon_fraction=1.0"]
    order = 1 if facts.direction == "min" else -1

    tuned = ["ruleset=external", "ruleset.studies=1", f"ruleset.trials={POINTS}", f"seed={GRID_SEED}"]
    runs = {name: load([*short, *tuned, *own, f"label={name}"]) for name, own in SUBMISSIONS.items()}
    entries = _finish(list(runs.values()), machine, say)
    points = [Point(e.base.submission_label, e.run, _final(e, facts)) for e in entries]
    points = sorted(points, key=lambda p: (order * p.value if p.value == p.value else float("inf"), p.name))
    for point in points:
        say(f"{workload} grid       {point.name:14} {point.value:.4f}  {_listed(point.hyperparameters)}")

    finalists = {point.name: _again(point, point.run, FINALIST_SEED, FINALIST_RUNS) for point in points[:FINALISTS]}
    entries = _finish(list(finalists.values()), machine, say)
    finals = {name: [_final(e, facts) for e in entries if e.base.label == run.label] for name, run in finalists.items()}
    for name, values in finals.items():
        say(f"{workload} finalist   {name:14} {' '.join(f'{value:.4f}' for value in values)}")
    medians = {name: statistics.median(values) for name, values in finals.items()}
    winner = min(medians, key=lambda name: order * medians[name])
    target = round(medians[winner], 4)

    # One seed can flatter a point: a finalist's five seeds tell more.
    ranked = [*sorted(points[:FINALISTS], key=lambda p: order * medians[p.name]), *points[FINALISTS:]]
    baseline = next(point for point in ranked if point.submission == BASELINE)
    whole = load([*base, *tuned, *SUBMISSIONS[BASELINE], f"label={BASELINE}"])
    confirm = _again(baseline, study.trial_of(whole, GRID_SEED, baseline.run.trial), CONFIRM_SEED, CONFIRM_RUNS)
    entries = sorted(_finish([confirm], machine, say), key=lambda e: e.seed)
    curves = [_curve(e) for e in entries]
    steps = [_steps_to(curve, facts, target) for curve in curves]
    hits = [step for step in steps if step is not None]
    variation = statistics.stdev(hits) / statistics.mean(hits) if len(hits) > 1 else float("nan")
    shares = [float(curve[-1]["accumulated_eval_time"]) / float(curve[-1]["total_duration"]) for curve in curves]
    quiet = len(hits) == len(steps) and variation <= LARGEST_VARIATION
    say(
        f"{workload} confirm    {len(hits)} of {len(steps)} reach {target}; steps-to-target {steps}, "
        f"coefficient of variation {100 * variation:.1f}%; "
        f"evaluation {100 * statistics.median(shares):.0f}% of the wall time"
    )
    provenance = {
        "procedure": f"python scripts/set_targets.py {workload} --scale {scale}",
        "grid": {point.name: round(point.value, 4) for point in points},
        "grid_seed": GRID_SEED,
        "finalists": {name: [round(value, 4) for value in values] for name, values in finals.items()},
        "finalist_seeds": [FINALIST_SEED, FINALIST_SEED + FINALIST_RUNS - 1],
        "winner": {winner: next(_rounded(p.hyperparameters) for p in points if p.name == winner)},
        "baseline": {baseline.name: _rounded(baseline.hyperparameters)},
        "confirm_seeds": [CONFIRM_SEED, CONFIRM_SEED + CONFIRM_RUNS - 1],
        "steps_to_target": steps,
        "hits": f"{len(hits)}/{len(steps)}",
        "coefficient_of_variation": round(variation, 4),
        "evaluations_to_target": statistics.median(hits) / facts.eval_every if hits else None,
        "evaluation_share_of_wall_time": round(statistics.median(shares), 2),
    }
    return Measured(target, len(hits) >= HITS_NEEDED, quiet, provenance)


def _finish(runs: Sequence[Run], machine: str, say: Say) -> list[Entry]:
    entries = ledger.plan(runs, machine)
    executors.execute(entries, say)
    for entry in entries:
        state = ledger.state_of(entry)
        if state.name in ("failed", "out_of_memory"):
            raise UserError(f"{entry.name} ended as {state.name}; see {entry.folder / 'manifest.json'}")
    return entries


def _again(point: Point, run: Run, seed: int, number: int) -> Run:
    """The run of `point` on `number` other seeds."""
    ruleset = run.ruleset.model_copy(update={"studies": number, "trials": 1, "points": "recipe"})
    label = f"{point.submission}-{point.run.trial}"
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


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {key: rounded(value) for key, value in values.items()}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in _rounded(values).items())


def write(path: Path, measured: Measured) -> None:
    """Put target and provenance into the workload's YAML at `path`; everything else there stays as it is."""
    text = path.read_text().split("target_provenance:")[0].rstrip() + "\n"
    version = re.search(r"^target_version: (\d+)$", text, re.MULTILINE)
    before = re.search(r"^target: (.*)$", text, re.MULTILINE)
    if before is None or version is None:
        raise UserError(f"{path} has no line `target: ...` and `target_version: ...` to write to; add them")
    number = int(version[1])
    if before[1] not in (str(measured.target), "???"):
        number += 1
    text = re.sub(r"^target: .*$", f"target: {measured.target}", text, flags=re.MULTILINE)
    text = re.sub(r"^target_version: .*$", f"target_version: {number}", text, flags=re.MULTILINE)
    path.write_text(text + OmegaConf.to_yaml({"target_provenance": measured.provenance}))
