"""What a trial leaves that must not depend on time: two trials that should be the same are compared by it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

_TIME_AND_MEMORY = {
    "score",
    "total_duration",
    "preemption_count",
    "peak_memory_bytes",
    "evaluation_memory_bytes",
    "data_memory_bytes",
}


class Outcome(NamedTuple):
    """Of one trial."""

    status: str
    hyperparameters: dict[str, Any]
    rows: list[dict[str, str]]
    """Every metric and counter of every evaluation, as written."""
    weights: str
    """SHA-256 of the final weights; empty for a trial that crashed."""


def read_outcome(folder: Path) -> Outcome:
    """Of the trial whose record lies in `folder`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    with (folder / "eval_measurements.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in _TIME_AND_MEMORY and not k.startswith("accumulated")}
            for row in csv.DictReader(file)
        ]
    return Outcome(manifest["status"], manifest["hyperparameters"], rows, manifest["final"].get("weights_sha256", ""))


def read_outcomes(records: Path) -> dict[str, Outcome]:
    """Of every trial below `records`, by study, workload and trial: "study_0/gpt2_pytorch/trial_1"."""
    return {"/".join(path.parts[-4:-1]): read_outcome(path.parent) for path in records.rglob("manifest.json")}
