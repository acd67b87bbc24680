"""The state that a submission written for AlgoPerf keeps, as plain data for a checkpoint, and back to the bit.

It is whatever `init_optimizer_state` returns: optimizers, schedulers and other objects with a `state_dict`, tensors,
numbers, and objects of the submission's own classes. A resume builds it anew and puts the saved values into it. What
can be neither saved nor rebuilt is refused by its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.interface.optimizer_state import Groups, load_optimizer, note_groups, save_optimizer
from harness.interface.plain_state import KIND, Packer
from harness.interface.submission import collect_tensors


class StatePacker(Packer):
    """Packs the state of one submission, and unpacks it into the one that was built."""

    def __init__(self, built: Any, parameters: Iterable[nn.Parameter], modules: Iterable[str], models: Iterable[Any]):
        """built: the state right after it was made. modules: those of the submission's own classes. models: the model
        and what it is wrapped in, which a checkpoint has already."""
        self._parameters = list(parameters)
        self._library = ""
        self._modules, self._models = frozenset(modules), list(models)
        self._built = dict(_walk(built, ""))
        self._optimizers = {p: v for p, v in self._built.items() if isinstance(v, torch.optim.Optimizer)}
        self._groups: dict[str, Groups] = {path: note_groups(o) for path, o in self._optimizers.items()}

    # ---- to plain data ---------------------------------------------------------------------------------------------

    def pack(self, value: Any, path: str = "") -> Any:
        """As plain data. Raises ValueError naming the key of what has no such form. path: the key of `value`."""
        if isinstance(value, torch.optim.Optimizer):
            return self._pack_optimizer(value, path)
        if any(value is model for model in self._models):
            return {KIND: "model", "value": self._index_of_model(value)}
        if isinstance(value, SimpleNamespace):
            return {KIND: "namespace", "value": self.pack(vars(value), path)}
        if _has_state(value):
            return {KIND: "stateful", "path": path, "value": self.pack(self._state_of(value, path), path)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {KIND: "named", "path": path, "value": self.pack(list(value), path)}
        if callable(value) and not isinstance(value, Tensor):
            if self._built.get(path) is value:
                return {KIND: "as built", "path": path}
            raise ValueError(f"{path or 'optimizer_state'} is a {type(value).__name__} that was not there at first")
        return super().pack(value, path)

    def _pack_optimizer(self, optimizer: torch.optim.Optimizer, path: str) -> dict[str, Any]:
        known = next((p for p, o in self._optimizers.items() if o is optimizer), None)
        if known is None:
            raise ValueError(f"{path or 'optimizer_state'} is an optimizer that init_optimizer_state did not make")
        if known != path:
            return {KIND: "optimizer of", "path": known}
        try:
            return {KIND: "optimizer", "path": path, "value": save_optimizer(optimizer, self._groups[path])}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _state_of(self, value: Any, path: str) -> Any:
        if path not in self._built:
            raise ValueError(f"{path} is a {type(value).__name__} that init_optimizer_state did not make")
        return value.state_dict()

    def _index_of_model(self, value: Any) -> int:
        return next(i for i, model in enumerate(self._models) if model is value)

    # ---- and back --------------------------------------------------------------------------------------------------

    def unpack(self, value: Any) -> Any:
        """What `pack` was given, with what had been built in its places."""
        kind = value.get(KIND) if isinstance(value, dict) else None
        if kind == "optimizer":
            optimizer = self._optimizers[value["path"]]
            load_optimizer(optimizer, value["value"], self._groups[value["path"]])
            return optimizer
        if kind == "optimizer of":
            return self._optimizers[value["path"]]
        if kind == "model":
            return self._models[value["value"]]
        if kind == "namespace":
            return SimpleNamespace(**self.unpack(value["value"]))
        if kind == "stateful":
            built = self._built[value["path"]]
            built.load_state_dict(self.unpack(value["value"]))
            return built
        if kind == "named":
            return type(self._built[value["path"]])(*self.unpack(value["value"]))
        if kind == "as built":
            return self._built[value["path"]]
        return super().unpack(value)

    def tensors(self, state: Any) -> list[Tensor]:
        """Every tensor that `state` holds, those of its optimizers too."""
        return collect_tensors(self.pack(state))

    def _is_of_library(self, cls: type[Any]) -> bool:
        is_plain = not issubclass(cls, torch.optim.Optimizer | nn.Module | type) and not hasattr(cls, "__slots__")
        return is_plain and cls.__module__ in self._modules


def _has_state(value: Any) -> bool:
    """Whether an object saves and loads its state itself."""
    if isinstance(value, type):
        return False
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested containers and namespaces with its key, written as `Packer.pack` writes keys."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}[{number}]")
    elif isinstance(value, SimpleNamespace):
        yield from _walk(vars(value), path)
