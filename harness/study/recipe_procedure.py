"""The procedure that chooses the recipes of submissions: the same small budget for each, in place of anybody's hand.

For every submission, on one seed and on each of some workloads over their whole budget and full schedules:

1. its present recipe
2. the first points of its search space, eight by default

A trial ends early at its target and for no other reason. The cost of a candidate on a workload is the share of the
budget at which it reaches the target, and for a miss 1 plus the distance of its best value from the target, relative to
the target. The recipe is the candidate of the least mean cost over the workloads; of equal ones the present recipe,
then the earlier point. One seed decides, so that the chosen recipe looks better here than on a fresh seed (the
provenance says which seed it was).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config.choices import config_files
from harness.config.compose import load_run
from harness.config.schema import SCHEDULE_KEYS, Run
from harness.errors import UserError
from harness.records.status import Status
from harness.study import executors, ledger
from harness.study.executors import Report
from harness.study.ledger import PlannedTrial

SEED = 920_000
"""In TARGET_SEEDS of harness/config/study_trials.py, so that no study has it."""
PRESENT = "recipe"
"""The name of the present recipe among the candidates; points have their numbers."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that was tried."""

    name: str
    """PRESENT, or the number of a point."""
    run: Run
    """The trial of one of the workloads, for the values."""
    outcomes: dict[str, str]
    """By workload: steps to the target, or the best value."""
    cost: float
    """The mean over the workloads."""


@dataclass(frozen=True)
class TunedRecipe:
    """The result for one submission."""

    submission: str
    candidates: list[Candidate]
    """The best first."""
    procedure: str
    """The command that gave it."""

    @property
    def best(self) -> Candidate:
        """The recipe."""
        return self.candidates[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """`recipe_provenance` of the submission's YAML."""
        costs = {candidate.name: round(candidate.cost, 4) for candidate in self.candidates}
        return {"procedure": self.procedure, "seed": SEED, "chosen": self.best.name, "costs": costs,
                "outcomes": self.best.outcomes}  # fmt: skip


def tune_recipes(
    submissions: Sequence[str], workloads: Sequence[str], points: int, arguments: Sequence[str], machine: str,
    report: Report,
) -> list[TunedRecipe]:  # fmt: skip
    """Run the unfinished trials of the procedure, and choose.

    arguments: further ones for every run, such as records= and executor.workers=. machine: the machine's folder name.
    Raises UserError where a trial cannot be read.
    """
    runs = [run for name in submissions for run in _runs(name, workloads, points, arguments)]
    trials = ledger.plan(runs, machine, report)
    executors.execute(trials, report)
    procedure = f"python scripts/tune_recipes.py --workloads {','.join(workloads)} --points {points}"
    return [_choose(name, [t for t in trials if t.study.optimizer.name == name], procedure) for name in submissions]


def write_recipe(path: Path, tuned: TunedRecipe) -> None:
    """Write recipe and provenance into the submission's YAML at `path`; everything else in it stays as it is.

    Raises UserError where it has no recipe to write to.
    """
    text = path.read_text()
    lines = re.search(r"^recipe:\n(?:[ ]+.*\n)+", text, re.MULTILINE)
    if lines is None:
        raise UserError(f"{path} has no block `recipe:` with keys below it; add one, with hyperparameters")
    text = re.sub(r"^recipe_provenance:\n(?:[ ]+.*\n)+", "", text, flags=re.MULTILINE)
    if tuned.best.name != PRESENT:
        text = text.replace(lines[0], _dump({"recipe": _recipe_of(tuned.best.run)}))
    path.write_text(text.rstrip("\n") + "\n" + _dump({"recipe_provenance": tuned.provenance}))


def recipe_file(submission: str) -> Path:
    """The YAML of a submission."""
    # A user's own folder wins over the one that is shipped.
    return config_files("optimizer", submission)[0]


def _runs(name: str, workloads: Sequence[str], points: int, arguments: Sequence[str]) -> list[Run]:
    runs = []
    for workload in workloads:
        # No judge: the submissions are Pacemark's own.
        common = [f"workload={workload}", f"optimizer={name}", "judge=none", f"seed={SEED}", *arguments]
        runs.append(load_run([*common, "ruleset=quick", f"label={name}"]))
        grid = ["ruleset=external", "ruleset.studies=1", f"ruleset.trials={points}", f"label={name}-points"]
        runs.append(load_run([*common, *grid]))
    return runs


def _choose(name: str, trials: Sequence[PlannedTrial], procedure: str) -> TunedRecipe:
    by_candidate: dict[str, list[PlannedTrial]] = {}
    for trial in trials:
        key = PRESENT if trial.study.ruleset.points == "recipe" else str(trial.path.trial)
        by_candidate.setdefault(key, []).append(trial)
    candidates = []
    for key, of_candidate in by_candidate.items():
        costs, outcomes = zip(*(_judge(trial) for trial in of_candidate), strict=True)
        named = {trial.path.workload: outcome for trial, outcome in zip(of_candidate, outcomes, strict=True)}
        candidates.append(Candidate(key, of_candidate[0].run, named, statistics.mean(costs)))
    candidates.sort(key=lambda candidate: (candidate.cost, candidate.name != PRESENT, candidate.name.rjust(4)))
    return TunedRecipe(name, candidates, procedure)


def _judge(trial: PlannedTrial) -> tuple[float, str]:
    """Cost of a trial, and its outcome in words."""
    state, spec = ledger.read_state(trial), trial.run.spec
    if state.name == Status.REACHED and state.final.steps_to_target is not None:
        steps = state.final.steps_to_target
        return steps / spec.max_steps, f"{steps:g} steps"
    best = state.final.of_metric(f"best_validation/{spec.metric}")
    if best is None or state.name == Status.DIVERGED:
        return float("inf"), state.name
    return 1 + abs(best - spec.target) / abs(spec.target), f"best {best:.4f}"


def _recipe_of(run: Run) -> dict[str, Any]:
    """The values of a trial as a recipe: those that differ from the paper's defaults, to three digits."""
    defaults, recipe = run.optimizer.paper_defaults, run.optimizer.recipe
    values = {key: _rounded(value) for key, value in recipe.hyperparameters.items()}
    kept = {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}
    shape = {key: _rounded(getattr(run.schedule, key)) for key in SCHEDULE_KEYS}
    rest = {"clip_norm": run.optimizer.clip_norm} if run.optimizer.clip_norm is not None else {}
    named = {} if recipe.schedule == "linear" else {"schedule": recipe.schedule}
    return {"hyperparameters": kept, **shape, **rest, **named}


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _dump(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, default_flow_style=None, sort_keys=False, width=120))
