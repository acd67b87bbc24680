"""How many studies and trials there are, and on which seeds: as many as the ruleset gives everybody, counted from 0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from harness.config.confirmation import CONFIRMED_SEEDS, FINALIST_SEED, FRESH_SEED, first_seed
from harness.config.schema import Ruleset
from harness.config.study_trials import TARGET_SEEDS
from harness.records.manifest import Manifest
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Finding, Severity
from harness.review.majority import freeze, majority
from harness.review.shipped import Shipped


def check_studies(trials: Sequence[TrialFolder], shipped: Shipped) -> Iterator[Finding]:
    """Trials beyond those of the ruleset, studies that lack some, and seeds that do not count up from its first one.

    A ruleset that confirms (harness/config/confirmation.py) has seeds of its own for every stage, and in its last stage
    one point. More studies than the ruleset asks for are welcome: they make intervals narrower and no median better.
    More trials in a study make the best of them better, so those beyond the ruleset's number do not count.
    """
    cells: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    unknown: dict[str, int] = defaultdict(int)
    confirmed: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, trial in enumerate(trials):
        manifest = trial.manifest
        if manifest is None or manifest.modified:
            continue
        if trial.study in TARGET_SEEDS:
            message = (
                f"study {trial.study}: targets are measured on seeds {TARGET_SEEDS[0]} to {TARGET_SEEDS[-1]}, and no "
                "study may have them; run it on other seeds"
            )
            yield Finding(trial.shown, Severity.REFUSED, "studies", message, i)
            continue
        rules = shipped.ruleset(manifest.ruleset)
        wrong_seed = None if rules is None else _wrong_seed(trial.study, rules)
        if wrong_seed is not None:
            yield Finding(trial.shown, Severity.REFUSED, "studies", wrong_seed, i)
            continue
        if rules is None:
            unknown[manifest.ruleset] += 1
        elif rules.tuning is not None and trial.trial > rules.tuning.studies * rules.tuning.trials:
            points = rules.tuning.studies * rules.tuning.trials
            message = (
                f"trial {trial.trial}: the number of its point, and ruleset {rules.name} tries {points}; for more "
                "write a ruleset of your own, for all submissions"
            )
            yield Finding(trial.shown, Severity.REFUSED, "studies", message, i)
            continue
        elif rules.tuning is None and trial.trial > rules.trials:
            message = (
                f"trial {trial.trial} of its study, and ruleset {rules.name} gives {rules.trials}: it does not count; "
                "for more trials write a ruleset of your own, for all submissions"
            )
            yield Finding(trial.shown, Severity.REFUSED, "studies", message, i)
            continue
        cells[trial.submission, trial.workload, manifest.ruleset][trial.study].append(trial.trial)
        if rules is not None and rules.tuning is not None and first_seed(rules) == FRESH_SEED:
            confirmed[trial.submission, trial.workload, rules.name].append(i)
    for name, count in sorted(unknown.items()):
        message = (
            f"{count} trials of this ruleset, which no config has, so their number and budget are not checked; "
            "pacemark --config-dir FOLDER names yours"
        )
        yield Finding(f"ruleset={name}", Severity.NOTE, "studies", message)
    for (submission, workload, name), members in sorted(confirmed.items()):
        yield from _check_one_point(f"{submission} on {workload}", name, trials, members)
    for (submission, workload, ruleset), studies in sorted(cells.items()):
        yield from _check_cell(f"{submission} on {workload}", ruleset, studies, shipped)


def _wrong_seed(study: int, rules: Ruleset) -> str | None:
    """Why a study of this ruleset may not have its seed; None where it may."""
    if study not in CONFIRMED_SEEDS and first_seed(rules) == 0:
        return None
    if first_seed(rules) == 0:
        return (
            f"study {study}: the seeds {CONFIRMED_SEEDS[0]} to {CONFIRMED_SEEDS[-1]} are kept for rulesets that "
            "confirm, so that nobody has seen them; run it on other seeds"
        )
    seeds = range(first_seed(rules), _after(rules))
    if study in seeds:
        return None
    return (
        f"study {study}: a stage of {rules.name} has the seeds from {seeds[0]} to {seeds[-1]}, and this is the seed of "
        "another stage or one that can have been seen; send the record in its own folder"
    )


def _after(rules: Ruleset) -> int:
    """The first seed after those of the ruleset's stage."""
    later = [seed for seed in (FINALIST_SEED, FRESH_SEED, CONFIRMED_SEEDS.stop) if seed > first_seed(rules)]
    return min(later)


def _check_one_point(path: str, ruleset: str, trials: Sequence[TrialFolder], members: list[int]) -> Iterator[Finding]:
    """One point is confirmed of a submission on a workload: of several, all but the usual one are refused."""
    points = {i: freeze([trials[i].trial, _settings(trials[i].manifest)]) for i in members}
    usual = majority(points.values())
    for i, point in points.items():
        if point != usual:
            message = (
                f"trial {trials[i].trial}: not at the point of the other trials of {path}, and ruleset {ruleset} "
                "confirms one; give each tuning a label of its own with label=NAME"
            )
            yield Finding(trials[i].shown, Severity.REFUSED, "studies", message, i)


def _settings(manifest: Manifest | None) -> list[Any]:
    """What a tuner may set."""
    identity = manifest.identity if manifest is not None else {}
    optimizer = identity.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    return [optimizer.get("hyperparameters"), optimizer.get("clip_norm"), identity.get("schedule")]


def _check_cell(path: str, ruleset: str, studies: dict[int, list[int]], shipped: Shipped) -> Iterator[Finding]:
    numbers = sorted(studies)
    rules = shipped.ruleset(ruleset)
    first = first_seed(rules) if rules is not None else 0
    if numbers != list(range(first, first + len(numbers))):
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        message = (
            f"studies {listed}: seeds must count up from {first}, or they can have been picked; run the missing ones"
        )
        yield Finding(path, Severity.WARNING, "studies", message)
    if rules is None or rules.tuning is not None:
        return
    lacking = {
        study: missing
        for study in numbers
        if (missing := sorted(set(range(1, rules.trials + 1)) - set(studies[study])))
    }
    if lacking:
        listed = "; ".join(f"study {study}: {', '.join(map(str, lacking[study][:8]))}" for study in list(lacking)[:4])
        message = (
            f"trials are missing, which count as not reached ({listed}{'; ...' if len(lacking) > 4 else ''}); "
            f"ruleset {ruleset} gives each study {rules.trials}"
        )
        yield Finding(path, Severity.WARNING, "studies", message)
