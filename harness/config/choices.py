"""The choices of a command: the files of configs/ and of the user's own folders, and what is wrong with a choice.

A variant of a workload is a file configs/workload/variant/<workload>-<scale>-<variant>.yaml. It is composed over the
workload at that scale and holds only what differs.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from harness.errors import UserError, did_you_mean

CONFIG_DIR = Path(__file__).parents[2] / "configs"
# A variable of the environment, since workers and trials are processes of their own.
CONFIG_DIR_VARIABLE = "PACEMARK_CONFIG_DIR"
"""Holds the user's own folders of configs, which --config-dir adds to; separated as in PATH."""
GROUPS = ("workload", "scale", "optimizer", "schedule", "ruleset", "executor", "tracker")
"""The config groups that a command chooses from."""
TEMPLATES = ("any", "algoperf")
"""Optimizers that a command completes, by a class or by a file; by themselves they are no submission."""
EXPERIMENT_GROUP = "experiment"
"""The group of presets, of which `+experiment=NAME` takes one."""
SCALE_GROUP, VARIANT_GROUP = "workload/scale", "workload/variant"
BASE_VARIANT = "base"
"""The value of variant= that means the workload itself."""


def user_config_dirs() -> list[Path]:
    """The user's own folders of configs, absolute. Raises UserError for one that is none."""
    folders = [Path(entry) for entry in os.environ.get(CONFIG_DIR_VARIABLE, "").split(os.pathsep) if entry]
    groups = (*GROUPS, EXPERIMENT_GROUP)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
        if not any((folder / group).is_dir() for group in groups):
            raise UserError(
                f"--config-dir {folder}: it has none of the folders {', '.join(groups)}; an optimizer's YAML, for "
                f"example, belongs into {folder / 'optimizer'}"
            )
    return [folder.resolve() for folder in folders]


def add_user_config_dir(folder: Path) -> None:
    """Let this process and those that it starts take configs from `folder` too. Raises UserError if it is none."""
    entries = [os.environ.get(CONFIG_DIR_VARIABLE, ""), str(folder.absolute())]
    os.environ[CONFIG_DIR_VARIABLE] = os.pathsep.join(filter(None, entries))
    user_config_dirs()


def config_files(group: str, choice: str) -> list[Path]:
    """The YAMLs of this name in the user's folders and in configs/; more than one is a mistake."""
    paths = [folder / group / f"{choice}.yaml" for folder in (*user_config_dirs(), CONFIG_DIR)]
    return [path for path in paths if path.is_file()]


def list_choices(group: str) -> list[str]:
    """The names in a config group, sorted, the user's own among them."""
    folders = (*user_config_dirs(), CONFIG_DIR)
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


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


def check_choices(selected: Mapping[str, str], keys: Collection[str] = ()) -> list[str]:
    """A line for each thing that is wrong with the choices of a command; empty if nothing is.

    selected: the choice by config group. `scale` and `variant` have defaults and must be there. keys: all that the
    command sets, among which a missing group may be misspelt.
    """
    messages = []
    for group, choice in selected.items():
        if group in GROUPS:
            messages += _check_choice(group, choice)
    for group in ("workload", "optimizer"):
        if group in selected:
            continue
        if misspelt := difflib.get_close_matches(group, keys, n=1, cutoff=0.7):
            messages.append(f"{misspelt[0]}: unknown key; did you mean `{group}`?")
        else:
            names = list_choices(group)
            listed = ", ".join(names) if len(names) <= 10 else "one of those that --help lists"
            messages.append(f"{group} is not given; add {group}=NAME, {listed}")
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


def _check_choice(group: str, choice: str) -> list[str]:
    paths = config_files(group, choice)
    if len(paths) == 1:
        return []
    if paths:
        files = " and ".join(str(path) for path in paths)
        return [f"{group}={choice}: {files} have the same name; rename yours, so that no record is taken for another's"]
    if choice.endswith((".yaml", ".yml")) or "/" in choice:
        return [
            f"{group}={choice}: give a name and no path; put the file into FOLDER/{group}/ and add --config-dir FOLDER"
        ]
    return [f"{group}={choice}: no such {group}; {did_you_mean(choice, list_choices(group))}"]


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
