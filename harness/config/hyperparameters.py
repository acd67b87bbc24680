"""Hyperparameters of a training algorithm: checked against the signature of its class, before anything is built.

Each class gets a pydantic model with a field for each hyperparameter. A field's type comes from the default value in
the signature; its range from the annotation (`pydantic.PositiveFloat` and the like), or else from its name: every `lr`
is positive, every `beta` in [0, 1). A `torch.optim.Optimizer` of another library knows its own ranges, and is asked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, StrictBool, ValidationError, create_model

from harness.errors import UserError, did_you_mean, shorten
from harness.interface.optimizer_signature import filled_arguments
from harness.interface.submission import FileSubmission, Submission, Wrapper

# ---- classes -------------------------------------------------------------------------------------------------------


def import_class(path: str, key: str) -> type[Any]:
    """The class at the import path `path`. The module is imported, with whatever that brings.

    key: the config key that `path` is the value of, which a UserError names if there is no such class.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or path.startswith("."):
        raise UserError(f"{key}={path}: write the full import path, like torch.optim.Adagrad")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}={path}: cannot import {module_name} ({error}); is its package installed?") from error
    except (Exception, SystemExit) as error:
        # A user's module can fail in any way when it runs.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}={path}: importing {module_name} fails ({reason}); debug=true shows where") from error
    if not hasattr(module, name):
        raise UserError(f"{key}={path}: {module_name} has no {name}; {did_you_mean(name, dir(module))}")
    cls = getattr(module, name)
    if not isinstance(cls, type):
        raise UserError(f"{key}={path}: this is not a class")
    return cls


def import_algorithm(path: str) -> type[Submission] | type[torch.optim.Optimizer]:
    """The class of `optimizer.class_path`; raises UserError if it is of neither kind."""
    cls = import_class(path, "optimizer.class_path")
    if not issubclass(cls, Submission | torch.optim.Optimizer):
        raise UserError(
            f"optimizer.class_path={path}: this is neither a torch.optim.Optimizer nor a harness.interface.Submission"
        )
    return cls


def import_submission(
    options: Any, device: torch.device | None = None
) -> type[Submission] | type[torch.optim.Optimizer]:
    """The class of a configuration (`harness.config.schema.Optimizer`): of a file, where `class_path` stands for files.
    device: of the trial. Raises UserError."""
    cls = import_algorithm(options.class_path)
    if not issubclass(cls, FileSubmission):
        return cls
    if options.path is None:
        raise UserError("optimizer.path is not given; add optimizer.path=FOLDER/submission.py")
    return cls.load(options.path, options, device)


def import_optimizer(path: str, key: str) -> type[torch.optim.Optimizer]:
    """The class at `path`; raises UserError, naming `key`, if it is no torch.optim.Optimizer."""
    cls = import_class(path, key)
    if not issubclass(cls, torch.optim.Optimizer):
        raise UserError(f"{key}={path}: this is not a torch.optim.Optimizer")
    return cls


def import_wrapper(path: str) -> type[Wrapper]:
    """A class of `optimizer.wrappers`; raises UserError if it is no wrapper."""
    cls = import_class(path, "optimizer.wrappers")
    if not issubclass(cls, Wrapper):
        raise UserError(f"optimizer.wrappers={path}: this is not a harness.interface.Wrapper")
    return cls


def signature_hyperparameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """By name, the hyperparameters that the class's own signature names; what disappears in **kwargs does not count."""
    # Without self and what it is built on: the parameters, or the setup and, for a wrapper, the submission inside.
    parameters = list(inspect.signature(cls.__init__).parameters.values())[3 if issubclass(cls, Wrapper) else 2 :]
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    filled = () if issubclass(cls, Submission) else filled_arguments(cls)
    return {p.name: p for p in parameters if p.kind not in hidden and p.name not in filled}


def checks_itself(cls: type[Any]) -> bool:
    """Whether the class knows its ranges better than the names of its hyperparameters do: an optimizer of another
    library, which is no `submissions.rule.Rule`."""
    return issubclass(cls, torch.optim.Optimizer) and not getattr(cls, "ranges_by_name", False)


def select_arguments(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that the class names, as its arguments: an algorithm and its wrappers share one mapping."""
    known = values if is_open(cls) else signature_hyperparameters(cls)
    # YAML has lists where torch wants tuples.
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known}


def is_open(cls: type[Any]) -> bool:
    """Whether the class takes hyperparameters of any name."""
    return issubclass(cls, FileSubmission) and cls.open_hyperparameters


# ---- checks --------------------------------------------------------------------------------------------------------


def check_hyperparameters(path: str, values: dict[str, Any], wrappers: Sequence[str] = ()) -> list[str]:
    """A line for every problem with the hyperparameters `values`; empty if there is none.

    path, wrappers: the import paths of the algorithm and of the wrappers around it, which share `values`. A class that
    is built on more than parameters is not tried (`harness.config.probe` does it).
    """
    try:
        classes: list[type[Any]] = [import_algorithm(path), *map(import_wrapper, wrappers)]
    except UserError as error:
        return error.messages
    counts = Counter(name for cls in classes for name in signature_hyperparameters(cls))
    together = " within ".join(cls.__name__ for cls in classes)
    messages = [
        f"optimizer.hyperparameters.{name}={shorten(value)}: {together} has no such hyperparameter; "
        f"{did_you_mean(name, counts)}"
        for name, value in values.items()
        if name not in counts and not any(map(is_open, classes))
    ]
    messages += [
        f"optimizer.wrappers: {together} share the hyperparameter {name}; they cannot be combined"
        for name, count in counts.items()
        if count > 1
    ]
    for cls in classes:
        messages += _value_problems(cls, values)
        messages += [
            f"optimizer.hyperparameters.{name} is missing: {cls.__name__} has no default for it; "
            f"add optimizer.hyperparameters.{name}=VALUE"
            for name, parameter in signature_hyperparameters(cls).items()
            if name not in values and parameter.default is inspect.Parameter.empty
        ]
    if not messages:
        messages += [
            message for cls in classes for message in _combination_problems(cls, select_arguments(cls, values))
        ]
    # Only where all else is right: otherwise the class refuses the same values again, in its own words. A Submission
    # cannot be tried this way, since it is built on a trial's setup.
    if not messages and set(_filled(classes[0])) == {"parameters"}:
        messages += _construction_problems(classes[0], select_arguments(classes[0], values))
    return messages


def check_part(key: str, path: str, values: dict[str, Any]) -> list[str]:
    """As `check_hyperparameters`, for an optimizer that is a part of another one and configured at `key`."""
    try:
        import_optimizer(path, f"{key}.class_path")
    except UserError as error:
        return error.messages
    messages = check_hyperparameters(path, values)
    return [message.replace("optimizer.hyperparameters", f"{key}.hyperparameters") for message in messages]


def _filled(cls: type[Any]) -> list[str]:
    return list(filled_arguments(cls).values()) if issubclass(cls, torch.optim.Optimizer) else []


def _value_problems(cls: type[Any], values: dict[str, Any]) -> list[str]:
    known = signature_hyperparameters(cls)
    own_values = {name: value for name, value in values.items() if name in known}
    problems = _faults(cls, own_values, ranges_of_names=not checks_itself(cls))
    if checks_itself(cls):
        # A range of a name is only a guess, of use where the class refuses the value too: it names the key.
        guessed = _faults(cls, own_values, ranges_of_names=True)
        problems |= {
            name: text
            for name, text in guessed.items()
            if name not in problems and _refuses(cls, {name: own_values[name]})
        }
    return [f"optimizer.hyperparameters.{name}={shorten(own_values[name])}: {text}" for name, text in problems.items()]


def _faults(cls: type[Any], values: dict[str, Any], *, ranges_of_names: bool) -> dict[str, str]:
    """What is wrong with the values, by hyperparameter."""
    try:
        _hyperparameter_model(cls, ranges_of_names).model_validate(values)  # type: ignore[arg-type]
    except ValidationError as error:
        return {str(detail["loc"][0]): _text(detail) for detail in error.errors()}
    return {}


def _text(detail: Any) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "bool_type":
        return "must be true or false"
    return str(detail["msg"]).replace("Input should", "must")


def _combination_problems(cls: type[Any], arguments: dict[str, Any]) -> list[str]:
    """What a submission says of hyperparameters that do not go together."""
    if issubclass(cls, Submission):
        try:
            cls.check_hyperparameters(arguments)
        except ValueError as error:
            return [f"optimizer.hyperparameters: {cls.__name__} refuses them: {error}"]
    return []


def _construction_problems(cls: type[torch.optim.Optimizer], arguments: dict[str, Any]) -> list[str]:
    """What the class's own checks say, tried on a parameter of two by two numbers."""
    try:
        # Two by two, since an optimizer of matrices such as torch.optim.Muon refuses vectors.
        cls([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    # Any exception: every library has its own way to refuse a value.
    except Exception as error:
        # What it refuses without any hyperparameters is no fault of theirs (`harness.config.probe` finds the cause).
        if not arguments or _refuses_defaults(cls):  # type: ignore[arg-type]
            return []
        listed = ", ".join(f"{name}={shorten(value)}" for name, value in arguments.items())
        message = f"optimizer.hyperparameters ({listed}): {cls.__name__} refuses them: {error}"
        # "SGD without momentum is not supported"
        for name in signature_hyperparameters(cls):
            if (
                name not in arguments
                and re.search(rf"\b{name}\b", str(error))
                and not _refuses(cls, arguments | {name: 0.9})
            ):
                message += f"; add optimizer.hyperparameters.{name}=0.9"
        return [message]
    return []


@functools.cache
def _refuses_defaults(cls: type[torch.optim.Optimizer]) -> bool:
    required = (p.default is inspect.Parameter.empty for p in signature_hyperparameters(cls).values())
    return not any(required) and _refuses(cls, {})


def _refuses(cls: Callable[..., Any], values: dict[str, Any]) -> bool:
    try:
        cls([torch.nn.Parameter(torch.zeros(2, 2))], **select_arguments(cls, values))  # type: ignore[arg-type]
    except Exception:
        return True
    return False


# ---- the type and range of each hyperparameter ---------------------------------------------------------------------


def _check_positive(number: float) -> None:
    if number <= 0:
        raise ValueError("must be above 0")


def _check_not_negative(number: float) -> None:
    if number < 0:
        raise ValueError("must be at least 0")


def _check_unit_interval(number: float) -> None:
    if not 0 <= number < 1:
        raise ValueError("must lie in [0, 1)")


_RANGE_OF_NAME: dict[str, Callable[[float], None]] = {
    "lr": _check_positive,
    "eps": _check_not_negative,
    "weight_decay": _check_not_negative,
    **dict.fromkeys(("beta", "beta1", "beta2", "beta3", "betas", "momentum", "dampening"), _check_unit_interval),
}
"""Ranges that hold in every library. The end of a name decides: `adamw_lr` is an `lr`."""


def range_name(name: str) -> str | None:
    """The known name that `name` is or ends in (`lr` for `adamw_lr`); None if its range is unknown."""
    return next((known for known in _RANGE_OF_NAME if name == known or name.endswith(f"_{known}")), None)


def annotated_ranges(cls: type[Any]) -> dict[str, Any]:
    """The annotations in the class's signature that state a range, by hyperparameter."""
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)
    except (NameError, TypeError):  # other libraries use names that exist for type checkers only
        return {}
    return {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}


# Cached, since every corner of a search space is checked against the same classes.
@functools.cache
def _hyperparameter_model(cls: type[Any], ranges_of_names: bool) -> type[BaseModel]:
    """A pydantic model with a field for each hyperparameter of the class; null is always allowed. ranges_of_names:
    whether a name gives a range, and numbers must be finite."""
    ranges = annotated_ranges(cls)
    fields: dict[str, Any] = {
        name: (_field_type(name, parameter, ranges.get(name), ranges_of_names) | None, None)
        for name, parameter in signature_hyperparameters(cls).items()
    }
    return create_model(cls.__name__, **fields)


def _field_type(name: str, parameter: inspect.Parameter, annotated_range: Any, ranges_of_names: bool) -> Any:
    """The type of a field, with the check of its range: from the default, else from the name, else anything."""
    default, known = parameter.default, range_name(name)
    # Before the numbers, since a bool is an int. The annotation is compared as text, because resolving the annotations
    # of a library can fail (see `annotated_ranges`).
    if isinstance(default, bool) or str(parameter.annotation) in ("bool", "bool | None", "typing.Optional[bool]"):
        return StrictBool
    if isinstance(default, str):
        return Annotated[Any, BeforeValidator(functools.partial(_check_text, default))]
    if not isinstance(default, int | float | tuple) and known is None:
        # Neither default nor name tells a type; only the class itself can check it.
        return Any
    # What the annotation states takes the place of what the name suggests.
    in_range = _RANGE_OF_NAME[known] if annotated_range is None and known is not None and ranges_of_names else None
    check = functools.partial(_check_numbers, default, known == "betas", in_range, not ranges_of_names)
    return Annotated[Any if annotated_range is None else annotated_range, BeforeValidator(check)]


def _check_text(default: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"must be a text like {default!r}")
    return value


def _check_numbers(
    default: Any, may_be_list: bool, in_range: Callable[[float], None] | None, may_be_infinite: bool, value: Any
) -> Any:
    """`value` if it is a number, or as many as a default that is a tuple has; ValueError otherwise."""
    is_list = isinstance(value, list | tuple)
    if isinstance(default, tuple):
        if not is_list or len(value) != len(default):
            raise ValueError(f"must be a list of {len(default)} numbers like {list(default)}")
    elif is_list and not may_be_list:
        raise ValueError("must be one number")
    items = value if is_list else [value]
    for item in items:
        # torch.optim.Adafactor has eps=(None, 1e-3).
        if item is None and isinstance(default, tuple) and None in default:
            continue
        # YAML's true would pass as the number 1.
        if isinstance(item, bool) or not isinstance(item, int | float):
            raise ValueError("must be a number" + (f", and {item!r} is none" if len(items) > 1 else ""))
        if math.isnan(item) or (math.isinf(item) and not may_be_infinite):
            raise ValueError("must be finite")
        if in_range is not None:
            in_range(item)
    return tuple(value) if is_list else value
