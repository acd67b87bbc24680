"""The workload of a record against the configs: problem, budget and target are those that all others had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.records.manifest import Manifest
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Remark, refused
from harness.review.shipped import Shipped

_DOCUMENTATION = {"description", "target_provenance"}
"""Keys of a workload that move no result."""
_RUN_AGAIN = "run it again with the shipped value, or leave it out"


def check_identity(trial: TrialFolder, manifest: Manifest, shipped: Shipped, own_targets: bool) -> Iterator[Remark]:
    """Differences between the workload of a record and the configs. own_targets: the target is the record's own
    business, since the table is scored under another one that was given."""
    # Facts that were overridden are named in `modified`, and no table takes such a trial.
    if manifest.modified:
        return
    workload = manifest.identity.get("workload")
    if not isinstance(workload, dict):
        yield refused("identity.workload: missing, so nothing tells what was trained; run it again")
        return
    yield from _check_summary(manifest, workload)
    expected = shipped.workload(trial.workload, manifest.scale)
    if expected is None:
        # harness/review/settings.py: such records must agree with one another.
        return
    version, own_version = expected["version"], workload.get("version")
    if own_version != version:
        yield refused(
            f"workload.version={own_version}, and configs/ has {version}: the problem has changed since; run it again"
        )
        return
    budget = shipped.max_steps(trial.workload, manifest.scale, manifest.ruleset)
    for key in sorted((expected.keys() | workload.keys()) - _DOCUMENTATION - {"version", "target", "target_version"}):
        if key == "max_steps":
            if budget is not None and workload.get(key) != budget:
                yield refused(
                    f"workload.max_steps={workload.get(key)}, and ruleset {manifest.ruleset} gives {budget}; "
                    f"run it again without ruleset.budget_factor"
                )
        elif workload.get(key) != expected.get(key):
            yield refused(
                f"workload.{key}={_shorten(workload.get(key))}, and configs/ has {_shorten(expected.get(key))}; "
                f"{_RUN_AGAIN}"
            )
    if not own_targets:
        yield from _check_target(workload, expected)


def _check_target(workload: dict[str, Any], expected: dict[str, Any]) -> Iterator[Remark]:
    target, version = workload.get("target"), workload.get("target_version")
    # The curve of an older version is scored again under today's target, since it was trained in the same way.
    if not isinstance(version, int) or version > expected["target_version"]:
        yield refused(
            f"workload.target_version={version}, and configs/ has {expected['target_version']}; "
            "bring this repository up to date, or give the target with --targets"
        )
    elif version == expected["target_version"] and target != expected["target"]:
        yield refused(
            f"workload.target={target}, and configs/ has {expected['target']} as version {version}; {_RUN_AGAIN}"
        )


def _check_summary(manifest: Manifest, workload: dict[str, Any]) -> Iterator[Remark]:
    """The keys of a manifest that repeat some of its identity."""
    name, variant = workload.get("name"), workload.get("variant")
    repeated = {
        "workload": (manifest.workload, name if variant is None else f"{name}_{variant}"),
        "workload_version": (manifest.workload_version, workload.get("version")),
        "target_version": (manifest.target_version, workload.get("target_version")),
        "target": (manifest.target, workload.get("target")),
        "direction": (manifest.direction, workload.get("direction")),
        "metric": (manifest.metric, f"validation/{workload.get('metric')}"),
    }
    for key, (value, of_identity) in repeated.items():
        if value != of_identity:
            yield refused(f"{key}={value}, and the manifest's identity has {of_identity}; send the record unchanged")


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
