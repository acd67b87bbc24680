"""Hyperparameters of a training algorithm: checked against what its class names, before anything is built."""

from __future__ import annotations

import importlib
import inspect
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from harness.problems import UserError, did_you_mean
from harness.submission import Submission, Wrapper

# The end of a name decides: `adamw_lr` is an lr.
_IN_UNIT_INTERVAL = {"beta", "beta1", "beta2", "beta3", "momentum", "betas", "dampening"}
_POSITIVE = {"lr", "eps"}
_NON_NEGATIVE = {"weight_decay"}
_NUMERIC = {*_IN_UNIT_INTERVAL, *_POSITIVE, *_NON_NEGATIVE}


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


def wrapper_class(path: str) -> type[Wrapper]:
    found = import_class(path, "optimizer.wrappers")
    if not issubclass(found, Wrapper):
        raise UserError(f"optimizer.wrappers={path}: this is not a harness.submission.Wrapper")
    return found


def accepted(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Hyperparameters that the class's own signature names; what disappears in **kwargs does not count."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # self, and the parameters or the setup
    if issubclass(cls, Wrapper):
        parameters = parameters[1:]  # the submission inside
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.kind not in hidden}


def own(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the class names, as arguments: the algorithm and its wrappers share one mapping."""
    known = accepted(cls)
    # YAML knows lists where torch wants tuples.
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}


def check(path: str, values: dict[str, Any], wrappers: Sequence[str] = ()) -> list[str]:
    """Every problem with the hyperparameters `values` of the class at `path` within the wrappers at `wrappers`."""
    try:
        classes: list[type[Any]] = [algorithm_class(path), *map(wrapper_class, wrappers)]
    except UserError as error:
        return error.problems
    names = Counter(name for cls in classes for name in accepted(cls))
    together = " within ".join(cls.__name__ for cls in classes)
    problems = [
        f"optimizer.hyperparameters.{name}={value}: {together} has no such hyperparameter; {did_you_mean(name, names)}"
        for name, value in values.items()
        if name not in names
    ]
    problems += [
        f"optimizer.wrappers: {together} share the hyperparameter {name}; they cannot be combined"
        for name, count in names.items()
        if count > 1
    ]
    for cls in classes:
        annotated = ranges(cls)
        for name, parameter in accepted(cls).items():
            if name in values:
                problems += _check_value(name, values[name], parameter, annotated.get(name))
            elif parameter.default is inspect.Parameter.empty:
                problems.append(
                    f"optimizer.hyperparameters.{name} is missing: {cls.__name__} has no default for it; "
                    f"add optimizer.hyperparameters.{name}=VALUE"
                )
    if not problems and issubclass(classes[0], torch.optim.Optimizer):
        problems += _dry_construction(classes[0], own(classes[0], values))
    return problems


def kind(name: str) -> str | None:
    """What a name says of the range: `adamw_lr` is an lr. None for other names."""
    return next((known for known in _NUMERIC if name == known or name.endswith(f"_{known}")), None)


def ranges(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """What the signature's annotations say of the range of a hyperparameter (`pydantic.PositiveFloat` and the like)."""
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)
    except (NameError, TypeError):  # of other libraries, with names that exist for type checkers only
        return {}
    return {name: TypeAdapter(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}


def _check_value(
    name: str, value: Any, parameter: inspect.Parameter, range_: TypeAdapter[Any] | None = None
) -> list[str]:
    default = parameter.default
    what = kind(name)
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
    numeric = isinstance(default, int | float | tuple) or what is not None
    if not numeric:
        return []
    if not isinstance(default, tuple) and isinstance(value, list | tuple) and what != "betas":
        return [f"{key}: must be one number"]
    nullable = isinstance(default, tuple) and None in default
    for item in items:
        if item is None and nullable:
            continue
        if isinstance(item, bool) or not isinstance(item, int | float):
            return [f"{key}: must be a number" + (f", and {item!r} is none" if len(items) > 1 else "")]
        if not math.isfinite(item):
            return [f"{key}: must be finite"]
        if range_ is not None:
            continue
        if (what in _POSITIVE and item < 0) or (what == "lr" and item == 0):
            return [f"{key}: must be above 0"]
        if what in _NON_NEGATIVE and item < 0:
            return [f"{key}: must be at least 0"]
        if what in _IN_UNIT_INTERVAL and not 0 <= item < 1:
            return [f"{key}: must lie in [0, 1)"]
    if range_ is not None:
        try:
            range_.validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            return [f"{key}: {detail['msg'].replace('Input should', 'must')}" for detail in error.errors()]
    return []


def _dry_construction(cls: type[torch.optim.Optimizer], values: dict[str, Any]) -> list[str]:
    """The class's own checks, on a parameter of two by two numbers."""
    try:
        cls([torch.nn.Parameter(torch.zeros(2, 2))], **values)
    except Exception as error:
        listed = ", ".join(f"{name}={value}" for name, value in values.items())
        return [f"optimizer.hyperparameters ({listed}): {cls.__name__} refuses them: {error}"]
    return []
