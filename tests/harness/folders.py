"""Folders of records for the tests of reading and scoring: AlgoPerf's, and ours with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.hashing import config_hash, trial_seed
from tests.harness.manifests import write_manifest

TARGETS = {"lm_silu": 1.5}
"""Those of tests/data/configs that are not 2."""
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
    """Below root/mini/<ruleset>/machine, with a manifest whose keys `manifest` replaces; what repeats them follows.

    The workload is one of tests/data/configs, which the fixture `workloads_of_tests` makes known.
    """
    parts = {"submission": submission, "workload": workload, "study": study, "trial": trial}
    path = algoperf_trial(root / "mini" / ruleset / "machine", values, seconds, steps, **parts)  # type: ignore[arg-type]
    whole = _whole_manifest(values, seconds, steps, ruleset=ruleset, parts=parts, replaced=manifest)
    write_manifest(path, **whole)
    return path


def _whole_manifest(
    values: Sequence[float],
    seconds: float,
    steps: int,
    *,
    ruleset: str,
    parts: dict[str, Any],
    replaced: dict[str, Any],
) -> dict[str, Any]:
    """The keys of a manifest that contradicts neither itself nor its folder nor its rows."""
    name, _, variant = parts["workload"].partition("_")
    problem = {"name": name, "class_path": "tests.none.None", "metric": "loss", "direction": "min"}
    problem |= {
        "version": replaced.get("workload_version", 1),
        "target": replaced.get("target", TARGETS.get(parts["workload"], 2.0)),
    }
    problem |= {
        "target_version": replaced.get("target_version", 2 if name == "lm" else 1),
        "nominal_batch": 32,
        "micro_batch": 32,
    }
    problem |= {"max_steps": 400, "eval_every": 100, "max_seconds": 3600, "model": {}, "data": {}}
    problem |= {"variant": variant} if variant else {}
    problem |= {"held_out": False} if name == "other" and variant else {}
    given = replaced.get("config", {})
    of_optimizer = given.get("optimizer", {})
    hyperparameters = of_optimizer.get("recipe", {}).get("hyperparameters", {"lr": 0.1})
    optimizer = {"name": parts["submission"], "class_path": "tests.none.Rule", "hyperparameters": hyperparameters}
    optimizer |= {"search_space": of_optimizer["search_space"]} if "search_space" in of_optimizer else {}
    schedule = {"shape": "linear", **{k: v for k, v in of_optimizer.get("recipe", {}).items() if "fraction" in k}}
    identity = {"workload": problem, "scale": {"name": "mini"}, "ruleset": {"name": ruleset}, "optimizer": optimizer}
    identity |= {"schedule": schedule, "seed": parts["study"], "trial": parts["trial"], "precision": "fp32"}
    identity |= {"compile": False, "deterministic": True, "threads": 1, "run_to_end": given.get("run_to_end", True)}
    status = replaced.get("status", "exhausted")
    identity |= {"pruning": "exact"} if status == "pruned" else {}
    config = {key: value for key, value in identity.items() if key not in given}
    config["optimizer"] = optimizer | {"description": "an optimizer", "hyperparameters": {}} | of_optimizer
    config["workload"] = problem | given.get("workload", {})
    meets = [i for i, value in enumerate(values) if np.isfinite(value) and value <= problem["target"]]
    final = {"disturbed": False, "time_to_target": None, "steps_to_target": None}
    if meets:
        first = meets[0] + 1
        final |= {"time_to_target": seconds * first, "steps_to_target": steps * first}
        # A trial that met its target has the status for it, whatever else a test is about.
        status = "reached" if status == "exhausted" else status
    elif status == "reached":
        status = "exhausted"
    seeds = {"study": parts["study"], "trial": parts["trial"], "base": trial_seed(parts["study"], parts["trial"])}
    repeated = {"target": problem["target"], "target_version": problem["target_version"]}
    evidence = {"judge": "none" if ruleset in ("quick", "many") else "process"}
    return (
        repeated
        | {
            "evidence": evidence,
            "config_hash": config_hash(identity),
            "identity": identity,
            "seeds": seeds,
            "final": final,
        }
        | {"submission": parts["submission"], "workload": parts["workload"], "hyperparameters": hyperparameters}
        | replaced
        | {"config": given | config, "status": status}
    )
