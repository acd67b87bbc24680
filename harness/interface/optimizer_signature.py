"""What the class of a foreign optimizer takes, by the names in the signatures of its constructor and of `step`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

Takes = Literal["parameters", "named_parameters", "model"]
"""What a class is built on."""

_SLOTS: dict[str, Takes | Literal["base"]] = {
    **dict.fromkeys(("params", "parameters", "param_groups"), "parameters"),
    **dict.fromkeys(("named_parameters", "named_params"), "named_parameters"),
    **dict.fromkeys(("model", "module"), "model"),
    **dict.fromkeys(("base_optimizer", "wrapped_optimizer", "inner_optimizer", "optimizer", "base"), "base"),
}


def filled_arguments(cls: type[Any]) -> dict[str, Takes | Literal["base"]]:
    """The arguments of an optimizer's constructor that are no hyperparameters, each with what belongs there."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    filled = {
        p.name: _SLOTS[p.name]
        for p in parameters
        if p.name in _SLOTS and (p.default is inspect.Parameter.empty or _SLOTS[p.name] == "base")
    }
    # The first one is what the optimizer works on, whatever its name.
    first = next((p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    return filled if first is None or first.name in filled else {first.name: "parameters", **filled}


def requires_base(cls: type[Any]) -> bool:
    """Whether the class goes around another optimizer and has none by itself."""
    defaults = inspect.signature(cls.__init__).parameters
    return any(
        slot == "base" and defaults[name].default is inspect.Parameter.empty
        for name, slot in filled_arguments(cls).items()
    )


def takes_model(cls: type[Any]) -> bool:
    """Whether the class is built on the model itself."""
    return "model" in filled_arguments(cls).values()


def requires_closure(cls: type[Any]) -> bool:
    """Whether `step` cannot be called without a closure."""
    closure = _step_parameters(cls).get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def takes_loss(cls: type[Any]) -> bool:
    """Whether `step` takes the value of the loss."""
    return "loss" in _step_parameters(cls)


def _step_parameters(cls: type[Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(cls.step).parameters
    except (TypeError, ValueError):  # a step that is not written in Python
        return {}
