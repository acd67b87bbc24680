"""Trials without a manifest among those that have one: nothing tells what they are."""

from __future__ import annotations

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
