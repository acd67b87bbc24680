"""What a command chooses from: the files of configs/, and what is wrong with a choice.

A held-out variant is a file configs/workload/variant/<workload>-<scale>-<variant>.yaml, which is composed over the
workload at that scale and holds only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.problems import did_you_mean

CONFIG_DIR = Path(__file__).parent.parent / "configs"
GROUPS = ("workload", "scale", "optimizer", "schedule", "ruleset", "executor", "tracker")
SCALE_GROUP, VARIANT_GROUP = "workload/scale", "workload/variant"
BASE = "base"
"""The value of variant= that means the workload itself."""


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def variants(workload: str, scale: str) -> list[str]:
    """The held-out variants of a workload at a scale."""
    prefix = f"{workload}-{scale}-"
    return [choice.removeprefix(prefix) for choice in choices(VARIANT_GROUP) if choice.startswith(prefix)]


def target_file(workload: str, scale: str, variant: str = BASE) -> Path:
    """The YAML that holds the target and its provenance."""
    if variant == BASE:
        return CONFIG_DIR / SCALE_GROUP / f"{workload}-{scale}.yaml"
    return CONFIG_DIR / VARIANT_GROUP / f"{workload}-{scale}-{variant}.yaml"


def check(chosen: Mapping[str, str]) -> list[str]:
    """What is wrong with the choices of a command: GROUPS and `variant`, of which scale and variant have defaults."""
    problems = [
        f"{group}={choice}: no such {group}; {did_you_mean(choice, choices(group))}"
        for group, choice in chosen.items()
        if group in GROUPS and choice not in choices(group)
    ]
    for group in ("workload", "optimizer"):
        if group not in chosen:
            problems.append(f"{group} is not given; add {group}=NAME, one of {', '.join(choices(group))}")
    if problems:
        return problems
    workload, scale, variant = chosen["workload"], chosen["scale"], chosen["variant"]
    if f"{workload}-{scale}" not in choices(SCALE_GROUP):
        scales = [c.rpartition("-")[2] for c in choices(SCALE_GROUP) if c.startswith(f"{workload}-")]
        return [f"scale={scale}: workload={workload} does not exist at this scale; it exists at {', '.join(scales)}"]
    known = [BASE, *variants(workload, scale)]
    if variant not in known:
        return [f"variant={variant}: workload={workload} has no such variant at scale={scale}; it has "
                f"{', '.join(known)}"]  # fmt: skip
    return []


def unmeasured(workload: str, scale: str, variant: str = BASE) -> str:
    """The problem of a workload whose target is not known yet."""
    command = f"python scripts/set_targets.py {workload}"
    if scale != "mini":
        command += f" --scale {scale}"
    name = f"workload={workload}"
    if variant != BASE:
        command, name = f"{command} --variant {variant}", f"{name} variant={variant}"
    return (
        f"workload.target=null: the target of {name} at scale={scale} has not been measured; measure it with "
        f"`{command} --write`, or give one for a try with workload.target=VALUE"
    )
