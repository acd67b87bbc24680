"""What a table is scored against: the workloads that count and the target of each.

Read from AlgoPerf's targets JSON, or gathered from the manifests of our own records.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import UserError

Direction = Literal["min", "max"]

# AlgoPerf's targets files before version 0.6 do not state the direction. These are all the metrics of its workloads
# (Dahl et al. 2023, table 1, and the 0.6 targets file); any other needs target_metric_goal.
ALGOPERF_DIRECTIONS: dict[str, Direction] = {
    "loss": "min",
    "ce_loss": "min",
    "ctc_loss": "min",
    "l1_loss": "min",
    "error_rate": "min",
    "wer": "min",
    "ppl": "min",
    "accuracy": "max",
    "bleu": "max",
    "mean_average_precision": "max",
    "ssim": "max",
}
GOALS: dict[str, Direction] = {"minimize": "min", "maximize": "max"}


@dataclass(frozen=True)
class Target:
    """The target of one workload."""

    metric: str
    """Column without its split: `accuracy` is read from `validation/accuracy`."""
    direction: Direction
    value: float
    version: str = ""
    """Version of workload and target; no table mixes two."""

    @property
    def column(self) -> str:
        """The metric's column in the evaluations."""
        return f"validation/{self.metric}"


@dataclass(frozen=True)
class Targets:
    """The workloads that are scored, and their targets."""

    base: tuple[str, ...]
    """Workloads that give points."""
    held_out: tuple[str, ...]
    """Variants that decide whether their base workload counts."""
    targets: dict[str, Target]
    """Of both."""

    def base_of(self, workload: str) -> str:
        """The base workload of a held-out one, or of a base workload itself; ValueError if there is none."""
        # The longest, since one base workload's name can begin with another's: vit_large_glu is of vit_large, not of
        # vit.
        return max((base for base in self.base if workload == base or workload.startswith(f"{base}_")), key=len)

    @property
    def scored(self) -> tuple[str, ...]:
        """All workloads, the base ones first."""
        return self.base + self.held_out


def read_targets(path: Path) -> Targets:
    """Read AlgoPerf's targets JSON: base_workloads, held_out_workloads, and for each workload target_metric_name,
    validation_target_value and, from version 0.6 on, target_metric_goal. Raises UserError with all that is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--targets {path} cannot be read ({error.strerror}); give AlgoPerf's targets JSON") from error
    except ValueError as error:
        raise UserError(f"--targets {path} is not JSON ({error}); give AlgoPerf's targets JSON") from error
    problems: list[str] = []
    base, held_out = (_parse_names(raw, key, problems) for key in ("base_workloads", "held_out_workloads"))
    table = raw.get("workloads") if isinstance(raw, dict) else None
    if not isinstance(table, dict):
        problems.append("workloads: a mapping from workload to its target is missing")
        table = {}
    targets = {}
    for name in (*base, *held_out):
        if name not in table:
            problems.append(f"workloads.{name}: missing, though base_workloads or held_out_workloads names it")
        elif (target := _parse_target(name, table[name], problems)) is not None:
            targets[name] = target
    for name in held_out:
        if not any(name.startswith(f"{b}_") for b in base):
            problems.append(
                f"held_out_workloads: {name} begins with no base workload's name; there are {', '.join(base)}"
            )
    if len(set(base) | set(held_out)) < len(base) + len(held_out):
        problems.append("base_workloads, held_out_workloads: a workload is listed twice")
    if problems:
        raise UserError(f"--targets {path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return Targets(base, held_out, targets)


def _parse_names(raw: Any, key: str, problems: list[str]) -> tuple[str, ...]:
    names = raw.get(key) if isinstance(raw, dict) else None
    # Files without held-out workloads may leave the key out.
    if key == "held_out_workloads" and isinstance(raw, dict) and key not in raw:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and is_plain(name) for name in names):
        problems.append(f"{key}: {names!r} must be a list of workload names without path separators")
        return ()
    if key == "base_workloads" and not names:
        problems.append(f"{key}: empty; there is nothing to score")
    return tuple(names)


def _parse_target(name: str, entry: Any, problems: list[str]) -> Target | None:
    """The target of one workload; None, and a line in `problems` for each thing that is wrong with it."""
    if not isinstance(entry, dict):
        problems.append(f"workloads.{name}: {entry!r} must be a mapping")
        return None
    metric, value = entry.get("target_metric_name"), entry.get("validation_target_value")
    own_problems = []
    if not isinstance(metric, str) or not metric:
        own_problems.append(f"workloads.{name}.target_metric_name: {metric!r} must be the name of a metric")
    # json reads NaN and Infinity as numbers, and a bool is an int.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        own_problems.append(f"workloads.{name}.validation_target_value: {value!r} must be a finite number")
    goal = entry.get("target_metric_goal")
    direction = ALGOPERF_DIRECTIONS.get(str(metric)) if goal is None else GOALS.get(str(goal))
    if direction is None:
        own_problems.append(
            f"workloads.{name}.target_metric_goal: {goal!r} for metric {metric!r}; say minimize or maximize"
        )
    problems += own_problems
    if own_problems:
        return None
    assert direction is not None and value is not None
    return Target(str(metric), direction, float(value))


def is_plain(name: str) -> bool:
    """Whether `name` can be one part of a path and stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in "/\\\0" or ord(c) < 32 for c in name)
