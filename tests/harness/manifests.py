"""Manifests for the tests: whole ones, of which a test replaces what it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.records.manifest import FORMAT, FORMAT_VERSION

FROM_THE_RUN = {"format", "format_version", "status", "modified", "config_hash", "identity", "config", "final"}
"""Keys that `Record.start` sets itself."""


def manifest_content(**replaced: Any) -> dict[str, Any]:
    """The content of a manifest.json, as a trial that used up its budget leaves it."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "status": "exhausted",
        "modified": [],
        "config_hash": "0" * 64,
        "identity": {"scale": {"name": "mini"}, "ruleset": {"name": "quick"}, "workload": {"max_steps": 400}},
        "config": {"optimizer": {"description": "an optimizer"}},
        "submission": "a",
        "workload": "lm",
        "workload_version": 1,
        "target_version": 1,
        "metric": "validation/loss",
        "direction": "min",
        "target": 2.0,
        "hyperparameters": {"lr": 0.1},
        "machine": {"cpu": "x"},
        "final": {"disturbed": False},
    } | replaced


def write_manifest(folder: Path, **replaced: Any) -> Path:
    """Write such a manifest into the folder of a trial; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest_content(**replaced)))
    return path
