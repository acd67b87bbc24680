"""The stages of a ruleset that confirms: tune once, try the best points again, measure the winner on fresh seeds.

    <records>/<scale>/<name>_tuning/...       the points of the search space, or another ruleset's own study
    <records>/<scale>/<name>_finalists/...    the best of them on other seeds
    <records>/<scale>/<name>/...              the winner on further ones: what a board is made of

Each stage has a ruleset, and so a folder, of its own, and seeds that no other stage and no other ruleset may have. In
the last two the number of a trial is that of its point: point i of study j of the tuning is j * trials + i.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.config.schema import Ruleset

CONFIRMED_SEEDS = range(800_000, 900_000)
"""Seeds that are kept for these rulesets, so that nobody has seen them before."""
TUNING_SEED, FINALIST_SEED, FRESH_SEED = 800_000, 800_100, 810_000
"""The first of each stage."""
TUNING, FINALISTS = "_tuning", "_finalists"
"""What the names of the stages' rulesets end in."""


def tuning_ruleset(rules: Ruleset, find: Callable[[str], Ruleset | None]) -> Ruleset:
    """The ruleset of the first stage. find: a ruleset of the configs by its name."""
    tuning = rules.tuning
    assert tuning is not None
    of_stage = {"studies": tuning.studies, "trials": tuning.trials, "kept": kept(rules)}
    other = None if tuning.ruleset is None else find(tuning.ruleset)
    if other is not None:
        return other.model_copy(update=of_stage)
    description = f"the points of which {rules.name} confirms one"
    return rules.model_copy(
        update={"name": rules.name + TUNING, "description": description, "tuning": None, **of_stage}
    )


def finalist_ruleset(rules: Ruleset) -> Ruleset:
    """The ruleset of the second stage."""
    assert rules.tuning is not None
    description = f"the best points of {rules.name}{TUNING} on seeds of their own"
    return rules.model_copy(
        update={"name": rules.name + FINALISTS, "description": description, "studies": rules.tuning.finalist_studies}
    )


def kept(rules: Ruleset) -> int:
    """How many points of a study of the tuning become finalists."""
    assert rules.tuning is not None
    return -(-rules.tuning.finalists // rules.tuning.studies)


def stage_ruleset(name: str, find: Callable[[str], Ruleset | None]) -> Ruleset | None:
    """The ruleset of a stage by its name; None where it is none."""
    for ending in (TUNING, FINALISTS):
        base = find(name.removesuffix(ending)) if name.endswith(ending) else None
        if base is not None and base.tuning is not None:
            return tuning_ruleset(base, find) if ending == TUNING else finalist_ruleset(base)
    return None


def first_seed(rules: Ruleset) -> int:
    """The seed from which the studies of a ruleset count up."""
    if rules.name.endswith(TUNING):
        return TUNING_SEED
    if rules.tuning is None:
        return 0
    return FINALIST_SEED if rules.name.endswith(FINALISTS) else FRESH_SEED
