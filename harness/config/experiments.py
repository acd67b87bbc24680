"""Presets: files experiment/NAME.yaml in Hydra's own form, which `+experiment=NAME` takes.

    # @package _global_
    defaults:
      - override /workload: gpt2
      - override /optimizer: lion
    ruleset:
      studies: 3

A preset is a command line in a file: each of its entries becomes KEY=VALUE. An argument of the command wins over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.config.choices import EXPERIMENT_GROUP, config_files, list_choices
from harness.errors import UserError, did_you_mean


def read_experiment(name: str) -> list[str]:
    """The arguments that the preset stands for, groups first. Raises UserError if there is no such preset or it cannot
    be read."""
    paths = config_files(EXPERIMENT_GROUP, name)
    if len(paths) != 1:
        known = list_choices(EXPERIMENT_GROUP)
        problem = "has several files" if paths else f"no such preset; {did_you_mean(name, known)}"
        raise UserError(f"experiment={name}: {problem}")
    try:
        # Not resolved: an interpolation is for the composed configuration.
        content = OmegaConf.to_container(OmegaConf.load(paths[0]), resolve=False)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"experiment={name}: {paths[0]} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"experiment={name}: {paths[0]} must hold `defaults:` and keys of the configuration")
    groups = [_group_argument(entry, name) for entry in content.pop("defaults", None) or [] if entry != "_self_"]
    return [*groups, *(f"{key}={quote(value)}" for key, value in _leaves(content, ""))]


def _group_argument(entry: Any, name: str) -> str:
    """`workload=gpt2` of the entry {"override /workload": "gpt2"} of a defaults list."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((key, choice),) = entry.items()
        words = str(key).split()
        if words and isinstance(choice, str):
            return f"{words[-1].strip('/')}={choice}"
    raise UserError(f"experiment={name}: {entry} in `defaults:` must be like `override /workload: gpt2`")


def _leaves(values: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def quote(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quote(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(quote(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
