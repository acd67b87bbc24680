"""The stopping rule of a running trial: reads the records of finished trials, and asks pruning_rules.

Only finished trials count. With several workers it depends on timing which siblings those are, so a study under pruning
cannot be repeated exactly. Pruning is therefore off by default and never used for a committed board.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.config.schema import Run
from harness.errors import ManifestError
from harness.interface.workload import WorkloadSpec
from harness.records.archive import read_archive
from harness.records.evaluations import read_evaluations_of
from harness.records.layout import ARCHIVE_SUFFIX, EVALUATIONS, MANIFEST, RecordPath, folder_of_archive
from harness.records.manifest import Manifest
from harness.study import pruning_rules
from harness.study.pruning_rules import Curve, References

logger = logging.getLogger(__name__)


class OnlinePruner:
    """The rule `run.pruning` for the trial whose record lies at `path`."""

    def __init__(self, run: Run, path: RecordPath) -> None:
        self._policy = run.pruning
        self._optimizer = run.optimizer.name
        self._spec = run.spec
        self._kept = run.ruleset.kept
        self._path = path
        self._siblings: dict[RecordPath, Curve] = {}
        self._references: References | None = None

    def stop_reason(self, rows: list[dict[str, Any]]) -> str | None:
        """Why the trial is to end after the last of its `rows`, for the record; None to go on."""
        columns = ("accumulated_submission_time", "global_step", f"validation/{self._spec.metric}")
        table = np.array([[float(row[column]) for column in columns] for row in rows]).reshape(-1, 3)
        seconds, steps, values = table.T
        trial = _make_curve(self._path, seconds, steps, values, self._spec)
        siblings = self._finished_siblings()
        reason = pruning_rules.stop_reason(self._policy, trial, siblings, self._other_submissions(), kept=self._kept)
        decision = "goes on" if reason is None else f"stops: {reason}"
        level = logging.DEBUG if reason is None else logging.INFO
        logger.log(level, "pruning=%s against %d finished trials: %s", self._policy, len(siblings), decision)
        return reason

    def _finished_siblings(self) -> list[Curve]:
        # At every evaluation, since siblings finish while this trial runs. Curves of finished trials do not change and
        # are read once.
        for path in self._path.trials_of_study():
            if path != self._path and path not in self._siblings and _read_finished(path, self._spec) is not None:
                curve = _read_curve(path, self._spec)
                if curve is not None:
                    self._siblings[path] = curve
        return list(self._siblings.values())

    def _other_submissions(self) -> References:
        # Only futility compares with other submissions; the others save reading their records.
        if self._policy != "futility":
            return pruning_rules.NO_REFERENCES
        # Read once: these are many files, and a trial should not wait for them at every evaluation.
        if self._references is None:
            self._references = References.from_trials(self._trials_of_others())
        return self._references

    def _trials_of_others(self) -> Iterator[tuple[str, int, Curve]]:
        """(submission, study, curve) of the same scale, ruleset and machine, since seconds are compared too. In folders
        and in archives, which stay packed."""
        for path in self._path.trials_on_workload():
            if self._is_of_another(_read_finished(path, self._spec)):
                curve = _read_curve(path, self._spec)
                if curve is not None:
                    yield path.label, path.study, curve
        for archive in sorted(self._path.machine_folder.glob(f"*{ARCHIVE_SUFFIX}")):
            for trial in read_archive(archive).trials.values():
                path = RecordPath.below(folder_of_archive(archive), trial.study, trial.workload, trial.trial)
                if path.workload != self._path.workload or path.folder.exists() or EVALUATIONS not in trial.files:
                    continue
                if self._is_of_another(_parse_finished(trial.files.get(MANIFEST), self._spec)):
                    curve = _parse_curve(path, trial.files[EVALUATIONS], self._spec)
                    if curve is not None:
                        yield path.label, path.study, curve

    def _is_of_another(self, manifest: Manifest | None) -> bool:
        # The same algorithm under another label may have tried the same points.
        return manifest is not None and manifest.optimizer.get("name") not in (None, self._optimizer)


def _read_finished(path: RecordPath, spec: WorkloadSpec) -> Manifest | None:
    """The manifest of a finished trial of this version of the workload; None for any other."""
    try:
        return _parse_finished(path.manifest.read_bytes(), spec)
    except OSError:
        return None


def _parse_finished(content: bytes | None, spec: WorkloadSpec) -> Manifest | None:
    # A damaged manifest of another trial must not end this one.
    try:
        manifest = None if content is None else Manifest.parse(content)
    except ManifestError:
        return None
    if manifest is None or not manifest.status.is_finished or manifest.workload_version != spec.version:
        return None
    return manifest


def _read_curve(path: RecordPath, spec: WorkloadSpec) -> Curve | None:
    try:
        return _parse_curve(path, path.evaluations.read_bytes(), spec)
    except OSError:
        return None


def _parse_curve(path: RecordPath, content: bytes, spec: WorkloadSpec) -> Curve | None:
    rows = read_evaluations_of(content, f"validation/{spec.metric}")
    return None if rows is None else _make_curve(path, rows.seconds, rows.steps, rows.value, spec)


def _make_curve(path: RecordPath, seconds: Any, steps: Any, values: Any, spec: WorkloadSpec) -> Curve:
    distance: Any = spec.distance(values)
    return Curve.from_columns(f"trial {path.trial}", seconds, steps, steps / spec.max_steps, distance)
