"""The state of one optimizer of any library: for a checkpoint, back from it, and its tensors to count.

Its own `state_dict`, and besides what the class keeps as attributes. What has no plain form is refused by its key.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.interface.plain_state import KIND, Packer
from harness.interface.submission import collect_tensors, plain_tensors, restore_tensors

Groups = list[dict[str, Any]]
"""The parameter groups of an optimizer as it was made (`note_groups`)."""


def note_groups(optimizer: torch.optim.Optimizer) -> Groups:
    """The parameter groups as they are now: right after it was made, what in them is constant."""
    return [dict(group) for group in optimizer.param_groups]


def save_optimizer(optimizer: torch.optim.Optimizer, made_with: Groups) -> dict[str, Any]:
    """Its state as plain data. Raises ValueError naming what a checkpoint cannot hold."""
    packer, state = Packer(optimizer), optimizer.state_dict()
    if "param_groups" in state:
        pairs = zip(state["param_groups"], made_with, strict=True)
        state = state | {"param_groups": [_without_constants(group, made) for group, made in pairs]}
    return {"state": packer.pack(state), "attributes": packer.pack(_attributes(optimizer))}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    made_with: Groups,
    together: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Continue from what `save_optimizer` returned. together: optimizers that may share its groups or its state, as one
    that goes around another does."""
    packer = Packer(optimizer)
    # Of before there were attributes.
    saved = saved if "attributes" in saved else {"state": saved, "attributes": {}}
    # Loading replaces them.
    shared = [
        (other, name)
        for other in together
        for name in ("param_groups", "state")
        if name in vars(other) and getattr(other, name) is getattr(optimizer, name)
    ]
    packed = dict(saved["state"])
    if "param_groups" in packed:
        pairs = zip(packed["param_groups"], made_with, strict=True)
        packed["param_groups"] = [_with_constants(group, made) for group, made in pairs]
    content = packer.unpack(packed)
    if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
        # torch rebuilds whatever it can iterate over, which it cannot do with arrays and bounded deques.
        optimizer.load_state_dict(packed)
        _restore(optimizer, content)
    else:
        optimizer.load_state_dict(content)
        if {"state", "param_groups"} <= content.keys():
            restore_tensors(optimizer, content)
    for other, name in shared:
        setattr(other, name, getattr(optimizer, name))
    vars(optimizer).update(packer.unpack(saved["attributes"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, made_with: Groups) -> list[Tensor]:
    """Every tensor that it holds between steps."""
    entries = [_without_constants(group, made) for group, made in zip(optimizer.param_groups, made_with, strict=True)]
    held = [list(dict(optimizer.state).values()), _attributes(optimizer), [_entries(group) for group in entries]]
    return collect_tensors(Packer(optimizer).pack(held))


def _restore(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Put what `content` holds in place of its packed form, which the optimizer has loaded."""
    for group, saved in zip(optimizer.param_groups, content["param_groups"], strict=True):
        group.update(_entries(saved))
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = dict(zip(numbers, parameters, strict=True))
    for number, saved in content["state"].items():
        key = keys.get(number, number)
        optimizer.state[key] = _settled(optimizer.state[key], saved)


def _settled(loaded: Any, saved: Any) -> Any:
    """`saved`, with the tensors that were loaded unless they were cast or moved."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        is_changed = loaded.dtype != saved.dtype or loaded.device != saved.device
        # A copy: the optimizer updates its state in place, and `saved` belongs to the caller.
        return saved.clone() if is_changed else loaded
    if type(loaded) is dict and type(saved) is dict and loaded.keys() == saved.keys():
        return {key: _settled(loaded[key], value) for key, value in saved.items()}
    if type(loaded) in (list, tuple) and type(saved) is type(loaded) and len(saved) == len(loaded):
        return type(loaded)(map(_settled, loaded, saved))
    return saved


def _entries(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


_OF_TORCH = frozenset({"state", "param_groups", "defaults"})
_PLAIN = (bool, int, float, str, np.generic, random.Random, torch.Generator)


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a class keeps beside its state: counters, averages. Not what refers to a parameter."""
    weights = {p.untyped_storage().data_ptr() for group in optimizer.param_groups for p in group["params"]}

    def is_plain(value: Any) -> bool:
        if isinstance(value, Tensor):
            pieces = [piece for piece in plain_tensors(value) if piece.numel()]
            is_weight = any(piece.untyped_storage().data_ptr() in weights for piece in pieces)
            return not isinstance(value, nn.Parameter) and not is_weight
        if isinstance(value, dict):
            return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
        if isinstance(value, list | tuple | deque):
            return all(map(is_plain, value))
        return value is None or isinstance(value, _PLAIN)

    kept = {name: value for name, value in vars(optimizer).items() if name not in _OF_TORCH and is_plain(value)}
    # torch's own dictionaries of hooks.
    return {name: value for name, value in kept.items() if not name.startswith("_optimizer_")}


_KEPT = {KIND: "as built"}
"""Stands for an entry of a parameter group that never changes and cannot be saved, such as a function."""


def _without_constants(group: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    def is_constant(key: str, value: Any) -> bool:
        return made.get(key) is value and (callable(value) or isinstance(value, enum.Enum))

    return {key: _KEPT if is_constant(key, value) else value for key, value in group.items()}


def _with_constants(group: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    return {key: made.get(key) if value == _KEPT else value for key, value in group.items()}
