"""Evaluate the weights again that a trial with judge=replay has kept, and compare with its record."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config.schema import Run
from harness.errors import UserError
from harness.interface.needs import Need
from harness.interface.workload import Split
from harness.records.evaluations import read_evaluations_of
from harness.records.layout import EVALUATIONS, MANIFEST
from harness.records.manifest import Manifest
from harness.records.trial_folders import find_trials, read_manifest
from harness.review.finding import Finding, Severity
from harness.seeding import TrialSeeds
from harness.trial.environment import configure_torch, select_device
from harness.trial.evaluation import evaluate
from harness.trial.training import build_model, precision_context
from harness.trial.trial import load_workload
from harness.trial.weights import hash_weights

TOLERANCE = 1e-3
"""Relative difference that another processor, precision or version of torch may make."""
_SPLITS: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Reevaluation:
    """One evaluation that was made again."""

    file: str
    column: str
    """For example `validation/loss`."""
    recorded: float
    """NaN where the record has no such value."""
    evaluated: float

    @property
    def agrees(self) -> bool:
        """Whether the record has the value that the weights give, or none."""
        return math.isnan(self.recorded) or math.isclose(self.recorded, self.evaluated, rel_tol=TOLERANCE)


def reevaluate(
    manifest: Manifest, files: dict[str, bytes], device: str = "auto", data: str = "auto"
) -> list[Reevaluation]:
    """Evaluate every file of weights of a trial with the workload's own model. files: those of its folder, by name.

    Raises UserError where the trial has kept no weights, where they are not those that it has noted, and where its
    workload is of neither Pacemark nor the user's own configuration.
    """
    kept = manifest.evidence.kept_weights if manifest.evidence is not None else {}
    if not kept:
        raise UserError("no weights were kept; the trial needs judge=replay for that")
    run = Run(
        **manifest.config | {"overwrite": False, "debug": False, "data": data, "device": device, "compile": False}
    )
    torch_device = select_device(run)
    configure_torch(run, torch_device)
    workload = load_workload(run, torch_device)
    model = build_model(workload, TrialSeeds(run.seed, run.trial), torch_device)
    needs = frozenset(Need(name) for name in manifest.needs)
    results = []
    for name, entry in kept.items():
        try:
            model.load_state_dict(torch.load(io.BytesIO(files[name]), map_location="cpu", weights_only=True))
        except Exception as error:
            # A stranger's file can be anything.
            raise UserError(f"{name} cannot be used ({type(error).__name__}); ask for the record again") from error
        if hash_weights(model) != entry.sha256:
            raise UserError(f"{name} does not hold the weights whose hash the record has; ask for the record again")
        for split in _SPLITS:
            column = f"{split}/{run.spec.metric}"
            metrics = evaluate(workload, model, model, split, lambda: precision_context(run, needs, torch_device))
            rows = read_evaluations_of(files[EVALUATIONS], column)
            recorded = rows.value[entry.row] if rows is not None and entry.row < len(rows.value) else math.nan
            results.append(Reevaluation(name, column, float(recorded), metrics[run.spec.metric]))
    return results


def review_weights(folders: Iterable[Path], device: str = "auto", data: str = "auto") -> list[Finding]:
    """A finding for every trial below `folders` with kept weights that give other values than its record, or that
    cannot be evaluated."""
    findings = []
    for trial in (trial for folder in folders for trial in find_trials(folder, [])):
        manifest = read_manifest(trial, []) if MANIFEST in trial.files else None
        if manifest is None or manifest.evidence is None or not manifest.evidence.kept_weights:
            continue
        names = trial.files & {EVALUATIONS, *manifest.evidence.kept_weights}
        try:
            results = reevaluate(manifest, {name: trial.read(name) for name in names}, device, data)
        except (UserError, OSError) as error:
            findings.append(Finding(trial.shown, Severity.WARNING, "weights", str(error)))
            continue
        findings += [
            Finding(
                trial.shown,
                Severity.REFUSED,
                "weights",
                f"{entry.column}={entry.recorded:.6g}: {entry.file} gives {entry.evaluated:.6g}; ask for it again",
            )
            for entry in results
            if not entry.agrees
        ]
    return findings
