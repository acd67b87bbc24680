"""Folders of records for the tests of reading and scoring: AlgoPerf's, and ours with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.manifests import write_manifest

HEADER = "accumulated_submission_time,global_step,score,train/loss,validation/loss,validation/num_examples"


def folder(root: Path, submission: str = "a", workload: str = "lm", study: int = 0, trial: int = 1) -> Path:
    path = root / submission / f"study_{study}" / f"{workload}_pytorch" / f"trial_{trial}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def curve(values: Sequence[float], seconds: float = 10.0, steps: int = 100) -> str:
    rows = [f"{seconds * i},{steps * i},{seconds * i},1.0,{v},64" for i, v in enumerate(values, 1)]
    return "\n".join([HEADER, *rows]) + "\n"


def algoperf_trial(root: Path, values: Sequence[float], seconds: float = 10.0, steps: int = 100, **parts: Any) -> Path:
    path = folder(root, **parts)
    (path / "eval_measurements.csv").write_text(curve(values, seconds, steps))
    return path


def pacemark_trial(
    root: Path,
    values: Sequence[float],
    seconds: float = 10.0,
    steps: int = 100,
    *,
    submission: str = "a",
    workload: str = "lm",
    study: int = 0,
    trial: int = 1,
    ruleset: str = "quick",
    **manifest: Any,
) -> Path:
    """Below root/mini/<ruleset>/machine, with a manifest whose keys `manifest` replaces."""
    parts = {"submission": submission, "workload": workload, "study": study, "trial": trial}
    path = algoperf_trial(root / "mini" / ruleset / "machine", values, seconds, steps, **parts)  # type: ignore[arg-type]
    identity = {"scale": {"name": "mini"}, "ruleset": {"name": ruleset}, "workload": {"max_steps": 400}}
    write_manifest(path, **{"submission": submission, "workload": workload, "identity": identity} | manifest)
    return path
