"""Which trials a study has: those that its ruleset gives a submission on a workload, each at its point."""

from __future__ import annotations

from harness.config.schema import Run
from harness.config.search_space import parse_search_space

TARGET_SEEDS = range(900_000, 1_000_000)
"""Seeds on which targets are measured; no study may have them."""


def list_trials(run: Run) -> list[tuple[int, int]]:
    """(study seed, trial number from 1) of all that `run` asks for: every trial of its ruleset, or, where the command
    line gives `trial=`, that one of each study."""
    numbers = [run.trial] if "trial" in run.overridden else list(range(1, run.ruleset.trials + 1))
    return [(run.seed + study, number) for study in range(run.ruleset.studies) for number in numbers]


def configure_trial(run: Run, seed: int, number: int) -> Run:
    """Trial `number` of the study with this seed, at its point of the search space if the ruleset draws from one."""
    trial = run.model_copy(update={"seed": seed, "trial": number, "label": run.submission_label})
    if run.ruleset.points == "recipe":
        return trial
    # The validation in harness.config refuses a ruleset that draws from a search space where there is none.
    assert run.optimizer.search_space is not None
    space = parse_search_space(run.optimizer.search_space)
    tuning = run.ruleset.tuning
    if tuning is not None:
        # The number of a trial is that of its point, whatever the seed (harness/config/confirmation.py).
        study, point = divmod(number - 1, tuning.trials)
        return trial.with_point(space.point(run.optimizer.name, tuning.seed + study, point + 1))
    return trial.with_point(space.point(run.optimizer.name, seed, number))
