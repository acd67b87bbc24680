"""The state of an optimizer of any library as plain data that a checkpoint can hold, and back.

A checkpoint is loaded without running anything (weights_only), so it holds tensors, numbers, texts, lists and
dictionaries. What else libraries keep is written as such: numpy's numbers and arrays, deques, sets, default
dictionaries, generators of random numbers, parameters as keys, and objects of the library's own classes by their
attributes. On loading such an object is made without its constructor, and only of a class of that library.
"""

from __future__ import annotations

import enum
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KIND = "pacemark.kind"
"""The key that marks what is not what it looks like."""
_FACTORIES: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "int": int, "float": float, "set": set}
_NATIVE = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


class Packer:
    """Packs and unpacks the state of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._library = type(optimizer).__module__.partition(".")[0]

    def pack(self, value: Any, path: str = "") -> Any:
        """As plain data. Raises ValueError naming the key of what has no such form. path: the key of `value`."""
        if isinstance(value, nn.Parameter):
            return {KIND: "parameter", "value": self._number(value, path)}
        if value is None or type(value) in _NATIVE or isinstance(value, Tensor):
            return value
        if isinstance(value, enum.Enum) and self._is_of_library(type(value)):
            return {KIND: "enum", "class": _name(type(value)), "value": value.name}
        if isinstance(value, dict):
            return self._pack_dict(value, path)
        if type(value) in (list, tuple):
            return type(value)(self.pack(item, f"{path}[{number}]") for number, item in enumerate(value))
        if isinstance(value, np.generic):
            return {KIND: "number", "dtype": value.dtype.str, "value": value.item()}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {KIND: "array", "dtype": value.dtype.str, "value": value.tolist(), "shape": list(value.shape)}
        if isinstance(value, deque):
            return {KIND: "deque", "length": value.maxlen, "value": self.pack(list(value), path)}
        if isinstance(value, set | frozenset) and all(isinstance(item, int | float | str) for item in value):
            return {KIND: "set", "value": sorted(value)}
        if isinstance(value, random.Random):
            return {KIND: "random", "value": value.getstate()}
        if isinstance(value, torch.Generator):
            return {KIND: "generator", "device": str(value.device), "value": value.get_state()}
        if self._is_of_library(type(value)):
            return {KIND: "object", "class": _name(type(value)), "value": self.pack(dict(vars(value)), path)}
        raise ValueError(f"{path or 'state'} is a {type(value).__name__}")

    def unpack(self, value: Any) -> Any:
        """What `pack` was given."""
        if type(value) in (list, tuple):
            return type(value)(map(self.unpack, value))
        if not isinstance(value, dict):
            return value
        if KIND not in value:
            return {key: self.unpack(item) for key, item in value.items()}
        content: Any = value.get("value")
        match value[KIND]:
            case "parameter":
                return self._parameters[content]
            case "by parameter":
                return {self.unpack(key): self.unpack(item) for key, item in content}
            case "number":
                return np.dtype(value["dtype"]).type(content)
            case "array":
                return np.array(content, dtype=value["dtype"]).reshape(value["shape"])
            case "deque":
                return deque(self.unpack(content), value["length"])
            case "set":
                return set(content)
            case "defaultdict":
                return defaultdict(_FACTORIES[value["factory"]], self.unpack(content))
            case "random":
                generator = random.Random()
                generator.setstate(content)
                return generator
            case "generator":
                return torch.Generator(value["device"]).set_state(content)
            case "object":
                made: Any = object.__new__(self._find_class(value["class"]))
                vars(made).update(self.unpack(content))
                return made
            case "enum":
                return self._find_class(value["class"])[content]
        raise ValueError(f"a checkpoint has state of the kind {value[KIND]}, which this version does not know")

    def _pack_dict(self, value: dict[Any, Any], path: str) -> Any:
        if isinstance(value, defaultdict) and value.default_factory is not None:
            factory = value.default_factory.__name__ if isinstance(value.default_factory, type) else ""
            if factory not in _FACTORIES:
                raise ValueError(f"{path or 'state'} is a defaultdict of a function")
            return {KIND: "defaultdict", "factory": factory, "value": self._pack_dict(dict(value), path)}
        if type(value) not in (dict, OrderedDict, defaultdict):
            raise ValueError(f"{path or 'state'} is a {type(value).__name__}")
        if any(isinstance(key, Tensor) for key in value):
            pairs = [(self.pack(key, path), self.pack(item, f"{path}[parameter]")) for key, item in value.items()]
            return {KIND: "by parameter", "value": pairs}
        return {key: self.pack(item, f"{path}[{key!r}]") for key, item in value.items()}

    def _number(self, parameter: nn.Parameter, path: str) -> int:
        for number, known in enumerate(self._parameters):
            if known is parameter:
                return number
        raise ValueError(f"{path or 'state'} is a parameter of no parameter group")

    def _is_of_library(self, cls: type[Any]) -> bool:
        is_plain = not issubclass(cls, torch.optim.Optimizer | nn.Module | type) and not hasattr(cls, "__slots__")
        return is_plain and self._library != "torch" and cls.__module__.partition(".")[0] == self._library

    def _find_class(self, name: str) -> Any:
        module, _, qualified = name.partition(":")
        # Of a module that is loaded already: loading a checkpoint imports nothing.
        cls: Any = sys.modules.get(module)
        for part in qualified.split("."):
            cls = getattr(cls, part, None)
        if not isinstance(cls, type) or not self._is_of_library(cls):
            raise ValueError(f"a checkpoint names {name}, which is no class of {self._library}")
        return cls


def _name(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
