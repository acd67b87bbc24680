"""Trials that are copies of other trials: no two runs have equal clocks, and no two seeds equal losses or weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.records.trial_folders import TrialFolder
from harness.review.columns import TrialRows
from harness.review.finding import Finding, Severity

_CLOCKS = ("submission_time", "evaluation", "logging", "total", "cpu")


def check_copies(trials: Sequence[TrialFolder], rows: Mapping[int, TrialRows]) -> Iterator[Finding]:
    """Each trial that equals one before it, in the order given. rows: of each trial that has some."""
    first_of: dict[Hashable, int] = {}
    for i, trial in enumerate(trials):
        for mark in _marks(trial, rows.get(i)):
            first = first_of.setdefault((mark.name, mark.value), i)
            # On one seed, two labels can be of the same algorithm.
            if first == i or (mark.of_seed and _seed(trials[first]) == _seed(trial)):
                continue
            message = f"{mark.name} equal those of {trials[first].shown}: one of the two is a copy; leave it out"
            yield Finding(trial.shown, Severity.REFUSED, "copy", message, i)
            break


@dataclass(frozen=True)
class _Mark:
    """Something that no other trial can have."""

    name: str
    value: Hashable
    of_seed: bool = True
    """Another trial on the same seed can have it."""


def _seed(trial: TrialFolder) -> tuple[int, int]:
    return trial.study, trial.trial


def _marks(trial: TrialFolder, rows: TrialRows | None) -> Iterator[_Mark]:
    manifest = trial.manifest
    if manifest is None:
        return
    if rows is not None and len(rows.seconds):
        clocks = [rows.further[name] for name in _CLOCKS]
        # A file with the training clock alone could have round numbers.
        if all(np.isfinite(clock).all() for clock in clocks):
            yield _Mark("its clocks", b"".join(clock.tobytes() for clock in clocks), of_seed=False)
        loss = rows.further["train_loss"]
        if len(set(loss[np.isfinite(loss)].tolist())) > 2:
            yield _Mark("its training losses", (trial.workload, loss.tobytes()))
    if manifest.final is not None and manifest.final.weights_sha256 is not None:
        yield _Mark("its final weights", manifest.final.weights_sha256)
