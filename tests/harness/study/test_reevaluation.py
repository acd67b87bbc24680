"""Weights that a trial has kept give the values of its record, and others do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.records.layout import EVALUATIONS, WEIGHTS_AT_END, WEIGHTS_AT_TARGET
from harness.study.reevaluation import reevaluate
from harness.trial.record import Record

Trial = Callable[..., Record]
ARGUMENTS = ("judge=replay", "workload.target=5.545", "run_to_end=true")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_weights_give_what_the_record_says(trial: Trial) -> None:
    record = trial(*ARGUMENTS, optimizer="schedule_free_adamw")
    results = reevaluate(record.manifest, files_of(record.folder))
    assert {(entry.file, entry.column) for entry in results} == {
        (name, f"{split}/loss") for name in (WEIGHTS_AT_TARGET, WEIGHTS_AT_END) for split in ("validation", "test")
    }
    # On the same machine to the bit.
    assert all(entry.evaluated == entry.recorded for entry in results)


def test_a_better_record_than_its_weights_is_seen(trial: Trial) -> None:
    record = trial(*ARGUMENTS)
    files = files_of(record.folder)
    last = record.rows[-1]["validation/loss"]
    files[EVALUATIONS] = files[EVALUATIONS].replace(str(last).encode(), str(last - 0.5).encode())
    wrong = [entry for entry in reevaluate(record.manifest, files) if not entry.agrees]
    assert [(entry.file, entry.column) for entry in wrong] == [(WEIGHTS_AT_END, "validation/loss")]


def test_other_weights_are_refused(trial: Trial) -> None:
    record, other = trial(*ARGUMENTS), trial(*ARGUMENTS, "seed=1")
    files = files_of(record.folder)
    with pytest.raises(UserError, match="whose hash the record has"):
        reevaluate(record.manifest, files | {WEIGHTS_AT_END: files_of(other.folder)[WEIGHTS_AT_END]})
    with pytest.raises(UserError, match="cannot be used"):
        reevaluate(record.manifest, files | {WEIGHTS_AT_END: b"no weights"})
    with pytest.raises(UserError, match="judge=replay"):
        reevaluate(trial("label=none").manifest, files)
