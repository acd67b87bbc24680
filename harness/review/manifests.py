"""Trials without a manifest, which cannot be checked, and what manifests say of the code that made the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from harness.records.layout import MANIFEST
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Finding, Severity


def check_manifests(trials: Sequence[TrialFolder]) -> Iterator[Finding]:
    """AlgoPerf's records have no manifest. Ours have one, and a record that has lost it cannot be checked."""
    ours = {trial.workload for trial in trials if trial.manifest is not None}
    for i, trial in enumerate(trials):
        if trial.manifest is None and trial.workload in ours:
            state = "cannot be used" if MANIFEST in trial.files else "missing"
            message = f"{MANIFEST}: {state}, so nothing can be checked; send the record as the run wrote it"
            yield Finding(trial.shown, Severity.REFUSED, "manifest", message, i)
    theirs = sum(trial.workload not in ours for trial in trials)
    if theirs:
        message = f"{theirs} trials without {MANIFEST}, as AlgoPerf's are: only their rows can be read"
        yield Finding("records", Severity.NOTE, "manifest", message)


def check_code(trials: Sequence[TrialFolder]) -> Iterator[Finding]:
    """How many records were made by files that differed from their commit."""
    counts: Counter[tuple[str, str]] = Counter()
    for trial in trials:
        if trial.manifest is not None and trial.manifest.code.get("modified") not in (False, None):
            counts[trial.manifest.ruleset, trial.submission] += 1
    for ruleset in sorted({ruleset for ruleset, _ in counts}):
        of_ruleset = {label: count for (name, label), count in sorted(counts.items()) if name == ruleset}
        listed = ", ".join(f"{count} of {label}" for label, count in list(of_ruleset.items())[:5])
        more = f" and {len(of_ruleset) - 5} more submissions" if len(of_ruleset) > 5 else ""
        message = f"code.modified=true: files of the code differed from its commit in {listed}{more}"
        yield Finding(f"ruleset={ruleset}", Severity.NOTE, "manifest", message)
