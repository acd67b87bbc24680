"""One label, one algorithm: all trials under a label must be of it, at points that its search space has."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from harness.config.search_space import Dimension, parse_search_space
from harness.errors import UserError
from harness.records.manifest import Manifest
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Finding, Severity
from harness.review.majority import freeze, majority
from harness.review.shipped import Shipped

_TUNED = {"hyperparameters", "search_space", "clip_norm"}
"""Keys of a submission's configuration that a search space may change, or that are looked at by themselves."""


def check_labels(trials: Sequence[TrialFolder], shipped: Shipped) -> Iterator[Finding]:
    """Trials that are of another algorithm than the rest of their label, or outside its search space."""
    labels: dict[str, list[int]] = defaultdict(list)
    for i, trial in enumerate(trials):
        # Targets are measured with trials of modified workloads, which no table takes.
        if trial.manifest is not None and not trial.manifest.modified:
            labels[trial.submission].append(i)
    for label, members in sorted(labels.items()):
        yield from _check_name(label, trials, members, shipped)
        yield from _check_equal(trials, members, "algorithm", _algorithm)
        by_workload: dict[str, list[int]] = defaultdict(list)
        for i in members:
            by_workload[trials[i].workload].append(i)
        for of_workload in by_workload.values():
            yield from _check_equal(trials, of_workload, "needs", lambda manifest: sorted(manifest.needs))
            yield from _check_equal(trials, of_workload, "search_space", _search_space)
            yield from _check_points(trials, of_workload)


def _algorithm(manifest: Manifest) -> Any:
    optimizer = manifest.identity.get("optimizer")
    schedule = manifest.identity.get("schedule")
    settings = {k: v for k, v in optimizer.items() if k not in _TUNED} if isinstance(optimizer, dict) else None
    return [settings, schedule.get("shape") if isinstance(schedule, dict) else None]


def _search_space(manifest: Manifest) -> Any:
    optimizer = manifest.identity.get("optimizer")
    return optimizer.get("search_space") if isinstance(optimizer, dict) else None


def _class_path(manifest: Manifest) -> Any:
    optimizer = manifest.identity.get("optimizer")
    return optimizer.get("class_path") if isinstance(optimizer, dict) else None


def _check_name(label: str, trials: Sequence[TrialFolder], members: list[int], shipped: Shipped) -> Iterator[Finding]:
    """A label that is the name of a shipped submission is of that submission."""
    expected = shipped.optimizer(label)
    if expected is None or label == "any":
        return
    for i in members:
        manifest = trials[i].manifest
        assert manifest is not None
        optimizer = manifest.identity.get("optimizer")
        optimizer = optimizer if isinstance(optimizer, dict) else {}
        wrappers = optimizer.get("wrappers") or []
        ran = (_class_path(manifest), wrappers)
        if ran != (expected.get("class_path"), expected.get("wrappers") or []):
            message = (
                f"optimizer.class_path={ran[0]}{f' in {wrappers}' if wrappers else ''}, and {label} is the name of "
                f"{expected.get('class_path')} in configs/; run it again under a label of its own"
            )
            yield Finding(trials[i].shown, Severity.REFUSED, "label", message, i)
        elif differing := _differing_from_recipe(optimizer, expected):
            message = (
                f"{', '.join(differing)}: not as configs/optimizer/{label}.yaml has it; "
                "give what differs from the shipped submission a label of its own"
            )
            yield Finding(trials[i].shown, Severity.WARNING, "label", message, i)


def _differing_from_recipe(optimizer: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What of a submission under a shipped name is not as shipped: its search space, or its recipe without one."""
    if "search_space" in optimizer:
        is_shipped = freeze(optimizer["search_space"]) == freeze(expected.get("search_space"))
        return [] if is_shipped else ["optimizer.search_space"]
    recipe = expected.get("recipe") or {}
    shipped = (expected.get("paper_defaults") or {}) | (recipe.get("hyperparameters") or {})
    ran = optimizer.get("hyperparameters")
    if not isinstance(ran, dict):
        return ["optimizer.hyperparameters"]
    return [
        f"optimizer.hyperparameters.{key}={ran.get(key)}"
        for key in sorted(shipped.keys() | ran.keys())
        if freeze(ran.get(key)) != freeze(shipped.get(key))
    ]


def _check_equal(trials: Sequence[TrialFolder], members: list[int], name: str, read: Any) -> Iterator[Finding]:
    texts = [freeze(read(trials[i].manifest)) for i in members]
    if len(set(texts)) <= 1:
        return
    usual = majority(texts)
    for i, text in zip(members, texts, strict=True):
        if text != usual:
            others = "the other trials" if usual is not None else "all trials"
            message = (
                f"{name}: not that of {others} under the label {trials[i].submission} "
                f"(class_path={_class_path(trials[i].manifest)}); give it a label of its own with label=NAME"  # type: ignore[arg-type]
            )
            yield Finding(trials[i].shown, Severity.REFUSED, "label", message, i)


# ---- points of a search space --------------------------------------------------------------------------------------


def _check_points(trials: Sequence[TrialFolder], members: list[int]) -> Iterator[Finding]:
    """Hyperparameters that differ between the trials of a label must be in its search space, and in their range."""
    manifests = {i: manifest for i in members if (manifest := trials[i].manifest) is not None}
    settings = {i: _settings(manifest) for i, manifest in manifests.items()}
    spaces = {freeze(_search_space(manifest)): _search_space(manifest) for manifest in manifests.values()}
    if len(spaces) != 1:
        # `_check_equal` has reported it.
        return
    (space,) = spaces.values()
    if space is None:
        yield from _check_untuned(trials, settings)
        return
    try:
        parsed = parse_search_space(space)
    except (UserError, TypeError, ValueError):
        for i in members:
            message = "optimizer.search_space: cannot be read; send the record as the run wrote it"
            yield Finding(trials[i].shown, Severity.REFUSED, "label", message, i)
        return
    for dimension in parsed.dimensions:
        values = {i: _value_at(settings[i], dimension) for i in members}
        # What the command sets over the search space is the same in all trials.
        if len({freeze(value) for value in values.values()}) == 1 and len(members) > 1:
            continue
        for i, value in values.items():
            if not _contains(dimension, value) and not _is_set_by_user(manifests[i], dimension):
                message = (
                    f"{dimension.name}={value}: outside the search space, {dimension.kind} {list(dimension.values)}"
                )
                yield Finding(
                    trials[i].shown, Severity.REFUSED, "label", f"{message}; tune with ruleset=external alone", i
                )
    # What no range is for is the recipe's, the same in all trials.
    ranged = {dimension.path[:2] for dimension in parsed.dimensions}
    rest = {i: {key: value for key, value in of.items() if key not in ranged} for i, of in settings.items()}
    if not parsed.points:
        yield from _check_untuned(trials, rest)


def _check_untuned(trials: Sequence[TrialFolder], settings: dict[int, dict[tuple[str, ...], Any]]) -> Iterator[Finding]:
    texts = {i: freeze(sorted((list(key), value) for key, value in of.items())) for i, of in settings.items()}
    usual = majority(texts.values())
    for i, text in texts.items():
        if text != usual:
            differing = sorted(
                {".".join(key) for other in settings.values() for key in other if settings[i].get(key) != other[key]}
            )
            message = (
                f"{', '.join(differing)}: not the same in all trials under the label {trials[i].submission}, and no "
                "search space has it; give it a label of its own with label=NAME"
            )
            yield Finding(trials[i].shown, Severity.REFUSED, "label", message, i)


def _settings(manifest: Manifest) -> dict[tuple[str, ...], Any]:
    """What a tuner could set, by its place in a recipe."""
    optimizer, schedule = manifest.identity.get("optimizer"), manifest.identity.get("schedule")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    hyperparameters = optimizer.get("hyperparameters")
    settings: dict[tuple[str, ...], Any] = {("clip_norm",): optimizer.get("clip_norm")}
    if isinstance(schedule, dict):
        settings |= {(key,): schedule.get(key) for key in ("warmup_fraction", "horizon_fraction")}
    if isinstance(hyperparameters, dict):
        settings |= {("hyperparameters", str(key)): value for key, value in hyperparameters.items()}
    return settings


def _value_at(settings: dict[tuple[str, ...], Any], dimension: Dimension) -> Any:
    depth = 2 if dimension.path[0] == "hyperparameters" else 1
    value = settings.get(tuple(map(str, dimension.path[:depth])))
    for part in dimension.path[depth:]:
        if not isinstance(value, list) or not isinstance(part, int) or part >= len(value):
            return None
        value = value[part]
    return value


def _contains(dimension: Dimension, value: Any) -> bool:
    if dimension.kind == "choices":
        return value in dimension.values
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    low, high = dimension.values
    # The ends come out of a logarithm and back.
    slack = 1e-9 * max(abs(low), abs(high))
    return bool(low - slack <= value <= high + slack)


def _is_set_by_user(manifest: Manifest, dimension: Dimension) -> bool:
    """Whether the command set what the dimension would have drawn."""
    set_by_user = manifest.optimizer.get("hyperparameters")
    return dimension.path[0] == "hyperparameters" and isinstance(set_by_user, dict) and dimension.path[1] in set_by_user
