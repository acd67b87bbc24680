"""The stopping policy of a running trial: reads what the finished trials around it recorded, and asks harness/pruning.

Siblings are looked up again at every evaluation, the other submissions' trials once. Only what has ended counts. With
several workers it depends on timing which siblings those are, so a study under pruning cannot be repeated exactly: that
is why it is off unless asked for, and never used for a committed board.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness import evaluations, pruning
from harness.config import Run
from harness.pruning import Curve, References
from harness.record import Status
from harness.workload import Facts


class Pruner:
    """Of the trial whose record lies in `folder`, .../<machine>/<label>/study_<i>/<workload>_pytorch/trial_<j>."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._policy = run.pruning
        self._name = run.optimizer.name
        self._facts = run.facts
        self._folder = folder
        self._siblings: dict[Path, Curve] = {}
        self._references: References | None = None

    def reason(self, rows: list[dict[str, Any]]) -> str | None:
        """Why the trial is to end after the last of its `rows`, in words for the record; None to go on."""
        names = ("accumulated_submission_time", "global_step", f"validation/{self._facts.metric}")
        seconds, steps, values = np.array([[float(row[name]) for name in names] for row in rows]).reshape(-1, 3).T
        trial = _curve(self._folder.name, seconds, steps, values, self._facts)
        return pruning.reason(self._policy, trial, self._finished_siblings(), self._others())

    def _finished_siblings(self) -> list[Curve]:
        for folder in sorted(self._folder.parent.glob("trial_*")):
            if folder != self._folder and folder not in self._siblings:
                manifest = _finished(folder, self._facts)
                if manifest is not None and (curve := _read(folder, self._facts)) is not None:
                    self._siblings[folder] = curve
        return list(self._siblings.values())

    def _others(self) -> References:
        if self._policy != "futility":
            return pruning.NOTHING
        if self._references is None:
            self._references = References.of(self._trials_of_others())
        return self._references

    def _trials_of_others(self) -> Iterator[tuple[str, int, Curve]]:
        """Of the same scale, ruleset and machine, since seconds are compared too."""
        machine, workload = self._folder.parents[3], self._folder.parent.name
        for folder in sorted(machine.glob(f"*/study_*/{workload}/trial_*")):
            manifest = _finished(folder, self._facts)
            # The same algorithm under another label may have tried the same points.
            if manifest is None or _name(manifest) in (None, self._name):
                continue
            if (curve := _read(folder, self._facts)) is not None:
                yield folder.parents[2].name, int(folder.parents[1].name.removeprefix("study_")), curve


def _finished(folder: Path, facts: Facts) -> dict[str, Any] | None:
    """The manifest of a trial of this version of the workload that has ended; None of any other."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        ended = Status(manifest["status"]).finished and manifest["workload_version"] == facts.version
        return dict(manifest) if ended else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(manifest: dict[str, Any]) -> str | None:
    name: str | None = manifest.get("config", {}).get("optimizer", {}).get("name")
    return name


def _read(folder: Path, facts: Facts) -> Curve | None:
    try:
        content = (folder / "eval_measurements.csv").read_bytes()
    except OSError:
        return None
    rows, refused, _ = evaluations.parse({0: content}, {0: f"validation/{facts.metric}"})
    return None if refused else _curve(folder.name, rows.seconds, rows.steps, rows.value, facts)


def _curve(folder: str, seconds: Any, steps: Any, values: Any, facts: Facts) -> Curve:
    distance: Any = facts.distance(values)
    return Curve.of(folder.replace("_", " "), seconds, steps, steps / facts.max_steps, distance)
