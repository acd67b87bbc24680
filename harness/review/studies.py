"""How many studies and trials there are, and on which seeds: as many as the ruleset gives everybody, counted from 0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from harness.config.study_trials import TARGET_SEEDS
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Finding, Severity
from harness.review.shipped import Shipped


def check_studies(trials: Sequence[TrialFolder], shipped: Shipped) -> Iterator[Finding]:
    """Trials beyond those of the ruleset, studies that lack some, and seeds that do not count up from 0.

    More studies than the ruleset asks for are welcome: they make intervals narrower and no median better. More trials
    in a study make the best of them better, so those beyond the ruleset's number do not count.
    """
    cells: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    unknown: dict[str, int] = defaultdict(int)
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
        if rules is None:
            unknown[manifest.ruleset] += 1
        elif trial.trial > rules.trials:
            message = (
                f"trial {trial.trial} of its study, and ruleset {rules.name} gives {rules.trials}: it does not count; "
                "for more trials write a ruleset of your own, for all submissions"
            )
            yield Finding(trial.shown, Severity.REFUSED, "studies", message, i)
            continue
        cells[trial.submission, trial.workload, manifest.ruleset][trial.study].append(trial.trial)
    for name, count in sorted(unknown.items()):
        message = (
            f"{count} trials of this ruleset, which no config has, so their number and budget are not checked; "
            "pacemark --config-dir FOLDER names yours"
        )
        yield Finding(f"ruleset={name}", Severity.NOTE, "studies", message)
    for (submission, workload, ruleset), studies in sorted(cells.items()):
        yield from _check_cell(f"{submission} on {workload}", ruleset, studies, shipped)


def _check_cell(path: str, ruleset: str, studies: dict[int, list[int]], shipped: Shipped) -> Iterator[Finding]:
    numbers = sorted(studies)
    if numbers != list(range(len(numbers))):
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        message = f"studies {listed}: seeds must count up from 0, or they can have been picked; run the missing ones"
        yield Finding(path, Severity.WARNING, "studies", message)
    rules = shipped.ruleset(ruleset)
    if rules is None:
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
