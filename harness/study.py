"""A study: the trials that a ruleset gives a submission on a workload."""

from __future__ import annotations

from harness import search_space
from harness.config import Run

TARGET_SEEDS = range(900_000, 1_000_000)
"""Seeds on which targets are measured; no study may have them."""


def trials_of(run: Run) -> list[tuple[int, int]]:
    """(study seed, trial) of all that `run` asks for: every trial of its ruleset, or of each study the one it names."""
    numbers = [run.trial] if "trial" in run.overridden else list(range(1, run.ruleset.trials + 1))
    return [(run.seed + study, number) for study in range(run.ruleset.studies) for number in numbers]


def trial_of(run: Run, seed: int, number: int) -> Run:
    """Trial `number` of the study with this seed, at its point of the search space if the ruleset draws from one."""
    trial = run.model_copy(update={"seed": seed, "trial": number, "label": run.submission_label})
    if run.ruleset.points == "recipe":
        return trial
    assert run.optimizer.search_space is not None  # harness.config has checked it
    space = search_space.parse(run.optimizer.search_space)
    return trial.at(space.point(run.optimizer.name, seed, number))
