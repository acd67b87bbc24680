"""A manifest against itself and against its folder: hash, seeds, numbers, label, and what ran against what is said."""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.schema import FOREIGN_KEYS
from harness.hashing import config_hash, trial_seed
from harness.records.manifest import Manifest
from harness.records.status import Status
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Remark, refused

_UNCHANGED = "send the record as the run wrote it, in its own folder"
_ONLY_IN_IDENTITY = {"workload", "optimizer", "ruleset"}
"""Keys that the configuration holds in more detail."""


def check_declared(trial: TrialFolder, manifest: Manifest) -> Iterator[Remark]:
    """Contradictions within a manifest, and between it and the folder that it lies in."""
    if (recomputed := config_hash(manifest.identity)) != manifest.config_hash:
        yield refused(
            f"config_hash={manifest.config_hash[:8]}..., and the identity has {recomputed[:8]}...; {_UNCHANGED}"
        )
    yield from _check_place(trial, manifest)
    yield from _check_seeds(trial, manifest)
    yield from _check_configuration(manifest)
    status = manifest.status
    if status.is_finished and not status.is_crash and manifest.final is None:
        yield refused(f"final: missing, though the status is {status}; {_UNCHANGED}")
    if status is Status.PRUNED and manifest.identity.get("pruning", "none") == "none":
        yield refused(f"status=pruned, though pruning is none; {_UNCHANGED}")


def _check_place(trial: TrialFolder, manifest: Manifest) -> Iterator[Remark]:
    if manifest.workload != trial.workload:
        yield refused(f"workload={manifest.workload}, and its folder is of {trial.workload}; {_UNCHANGED}")
    if manifest.submission != trial.submission:
        yield refused(
            f"submission={manifest.submission}, and its folder is of {trial.submission}; label=NAME makes a record "
            "under another name"
        )
    for key, number in (("seed", trial.study), ("trial", trial.trial)):
        if manifest.identity.get(key) != number:
            level = "study" if key == "seed" else "trial"
            yield refused(
                f"identity.{key}={manifest.identity.get(key)}, and its folder is {level}_{number}; {_UNCHANGED}"
            )


def _check_seeds(trial: TrialFolder, manifest: Manifest) -> Iterator[Remark]:
    expected = {"study": trial.study, "trial": trial.trial, "base": trial_seed(trial.study, trial.trial)}
    for key, value in expected.items():
        if manifest.seeds.get(key) != value:
            yield refused(f"seeds.{key}={manifest.seeds.get(key)}, and it must be {value}; {_UNCHANGED}")


def _check_configuration(manifest: Manifest) -> Iterator[Remark]:
    """What ran, `config`, against what is said to have run, `identity`."""
    config, identity = manifest.config, manifest.identity
    for key in sorted(identity.keys() - _ONLY_IN_IDENTITY):
        # A key that came later is absent from older configurations, as `pruning` is from identities.
        if key in config and config[key] != identity[key]:
            yield refused(f"config.{key}={config[key]}, and the identity has {identity[key]}; {_UNCHANGED}")
    ran, stated = config.get("optimizer"), identity.get("optimizer")
    if not isinstance(ran, dict) or not isinstance(stated, dict):
        yield refused(f"config.optimizer: missing or no mapping, so nothing tells what was run; {_UNCHANGED}")
        return
    for key in ("name", "class_path", "wrappers", "closure", "batch_size", "file_sha256", *FOREIGN_KEYS):
        if (ran.get(key) or None) != (stated.get(key) or None):
            yield refused(
                f"config.optimizer.{key}={ran.get(key)}, and the identity has {stated.get(key)}; {_UNCHANGED}"
            )
    if stated.get("hyperparameters") != manifest.hyperparameters:
        yield refused(f"hyperparameters: not those of the identity; {_UNCHANGED}")
    workload = config.get("workload")
    before = identity.get("workload")
    if isinstance(workload, dict) and isinstance(before, dict):
        for key in sorted(before):
            if workload.get(key) != before[key]:
                yield refused(f"config.workload.{key}: not the one of the identity; {_UNCHANGED}")
