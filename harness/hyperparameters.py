"""Hyperparameters of a training algorithm: checked against what its class names, before anything is built."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import torch

from harness.problems import UserError, did_you_mean
from harness.submission import Submission

_IN_UNIT_INTERVAL = {"beta", "beta1", "beta2", "beta3", "momentum", "betas", "dampening"}
_POSITIVE = {"lr", "eps"}
_NON_NEGATIVE = {"weight_decay"}


def import_class(path: str, key: str) -> type[Any]:
    """The class at `path`; UserError naming `key` when it cannot be had."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"{key}={path}: write the full import path, like torch.optim.Adagrad")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}={path}: cannot import {module_name} ({error}); is its package installed?") from error
    if not hasattr(module, name):
        raise UserError(f"{key}={path}: {module_name} has no {name}; {did_you_mean(name, dir(module))}")
    found = getattr(module, name)
    if not isinstance(found, type):
        raise UserError(f"{key}={path}: this is not a class")
    return found


def algorithm_class(path: str) -> type[Submission] | type[torch.optim.Optimizer]:
    found = import_class(path, "optimizer.class_path")
    if not issubclass(found, Submission | torch.optim.Optimizer):
        raise UserError(
            f"optimizer.class_path={path}: this is neither a torch.optim.Optimizer nor a harness.submission.Submission"
        )
    return found


def accepted(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Hyperparameters that the class's own signature names; what disappears in **kwargs does not count."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # self, and the parameters or the setup
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.kind not in hidden}


def check(path: str, values: dict[str, Any]) -> list[str]:
    """Every problem with the hyperparameters `values` of the class at `path`."""
    try:
        cls = algorithm_class(path)
    except UserError as error:
        return error.problems
    known = accepted(cls)
    problems = [
        f"optimizer.hyperparameters.{name}={value}: {cls.__name__} has no such hyperparameter; "
        f"{did_you_mean(name, known)}"
        for name, value in values.items()
        if name not in known
    ]
    for name, parameter in known.items():
        if name in values:
            problems += _check_value(name, values[name], parameter)
        elif parameter.default is inspect.Parameter.empty:
            problems.append(
                f"optimizer.hyperparameters.{name} is missing: {cls.__name__} has no default for it; "
                f"add optimizer.hyperparameters.{name}=VALUE"
            )
    if not problems and issubclass(cls, torch.optim.Optimizer):
        problems += _dry_construction(cls, values)
    return problems


def as_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """YAML knows lists where torch wants tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_value(name: str, value: Any, parameter: inspect.Parameter) -> list[str]:
    default = parameter.default
    key = f"optimizer.hyperparameters.{name}={value}"
    if value is None:
        return []
    if isinstance(default, bool) or str(parameter.annotation) in ("bool", "bool | None", "typing.Optional[bool]"):
        return [] if isinstance(value, bool) else [f"{key}: must be true or false"]
    if isinstance(default, str):
        return [] if isinstance(value, str) else [f"{key}: must be a text like {default!r}"]
    items = value if isinstance(value, list | tuple) else [value]
    if isinstance(default, tuple) and (not isinstance(value, list | tuple) or len(value) != len(default)):
        return [f"{key}: must be a list of {len(default)} numbers like {list(default)}"]
    numeric = isinstance(default, int | float | tuple) or name in _IN_UNIT_INTERVAL | _POSITIVE | _NON_NEGATIVE
    if not numeric:
        return []
    if not isinstance(default, tuple) and isinstance(value, list | tuple) and name != "betas":
        return [f"{key}: must be one number"]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float):
            return [f"{key}: must be a number" + (f", and {item!r} is none" if len(items) > 1 else "")]
        if not math.isfinite(item):
            return [f"{key}: must be finite"]
        if (name in _POSITIVE and item < 0) or (name == "lr" and item == 0):
            return [f"{key}: must be above 0"]
        if name in _NON_NEGATIVE and item < 0:
            return [f"{key}: must be at least 0"]
        if name in _IN_UNIT_INTERVAL and not 0 <= item < 1:
            return [f"{key}: must lie in [0, 1)"]
    return []


def _dry_construction(cls: type[torch.optim.Optimizer], values: dict[str, Any]) -> list[str]:
    """The class's own checks, on a parameter of two by two numbers."""
    try:
        cls([torch.nn.Parameter(torch.zeros(2, 2))], **as_arguments(values))
    except Exception as error:
        listed = ", ".join(f"{name}={value}" for name, value in values.items())
        return [f"optimizer.hyperparameters ({listed}): {cls.__name__} refuses them: {error}"]
    return []
