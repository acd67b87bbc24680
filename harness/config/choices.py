"""The choices of a command: the files of configs/, and what is wrong with a choice.

A variant of a workload is a file configs/workload/variant/<workload>-<scale>-<variant>.yaml. It is composed over the
workload at that scale and holds only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.errors import did_you_mean

CONFIG_DIR = Path(__file__).parents[2] / "configs"
GROUPS = ("workload", "scale", "optimizer", "schedule", "ruleset", "executor", "tracker")
"""The config groups that a command chooses from."""
SCALE_GROUP, VARIANT_GROUP = "workload/scale", "workload/variant"
BASE_VARIANT = "base"
"""The value of variant= that means the workload itself."""


def list_choices(group: str) -> list[str]:
    """The names in a config group, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def list_variants(workload: str, scale: str) -> list[str]:
    """The names of a workload's variants at a scale, sorted, without the base."""
    # Not split at the hyphens, which variants have in their names too (res-post-norm).
    prefix = f"{workload}-{scale}-"
    return [choice.removeprefix(prefix) for choice in list_choices(VARIANT_GROUP) if choice.startswith(prefix)]


def target_file(workload: str, scale: str, variant: str = BASE_VARIANT) -> Path:
    """The path of the YAML that holds the target and its provenance. It need not exist."""
    if variant == BASE_VARIANT:
        return CONFIG_DIR / SCALE_GROUP / f"{workload}-{scale}.yaml"
    return CONFIG_DIR / VARIANT_GROUP / f"{workload}-{scale}-{variant}.yaml"


def check_choices(selected: Mapping[str, str]) -> list[str]:
    """A line for each thing that is wrong with the choices of a command; empty if nothing is.

    selected: the choice by config group. `scale` and `variant` have defaults and must be there.
    """
    messages = [
        f"{group}={choice}: no such {group}; {did_you_mean(choice, list_choices(group))}"
        for group, choice in selected.items()
        if group in GROUPS and choice not in list_choices(group)
    ]
    for group in ("workload", "optimizer"):
        if group not in selected:
            messages.append(f"{group} is not given; add {group}=NAME, one of {', '.join(list_choices(group))}")
    if messages:
        return messages
    # What follows looks up the workload's scales and variants, so it needs a workload that exists.
    workload, scale, variant = selected["workload"], selected["scale"], selected["variant"]
    scales_and_workloads = list_choices(SCALE_GROUP)
    if f"{workload}-{scale}" not in scales_and_workloads:
        scales = [c.rpartition("-")[2] for c in scales_and_workloads if c.startswith(f"{workload}-")]
        return [f"scale={scale}: workload={workload} does not exist at this scale; it exists at {', '.join(scales)}"]
    variants = [BASE_VARIANT, *list_variants(workload, scale)]
    if variant not in variants:
        return [
            f"variant={variant}: workload={workload} has no such variant at scale={scale}; it has {', '.join(variants)}"
        ]
    return []


def target_not_measured(workload: str, scale: str, variant: str = BASE_VARIANT) -> str:
    """The message for a workload whose target is not known yet."""
    command = f"python scripts/set_targets.py {workload}"
    # mini and base are the script's defaults, which the command leaves out.
    if scale != "mini":
        command += f" --scale {scale}"
    name = f"workload={workload}"
    if variant != BASE_VARIANT:
        command, name = f"{command} --variant {variant}", f"{name} variant={variant}"
    return (
        f"workload.target=null: the target of {name} at scale={scale} has not been measured; measure it with "
        f"`{command} --write`, or give one for a try with workload.target=VALUE"
    )
