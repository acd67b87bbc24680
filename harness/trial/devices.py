"""Where the tensors of a checkpoint were: it is loaded on the CPU, so that a GPU holds no second copy of the trial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.interface.submission import collect_tensors


def device_types(state: Any) -> list[str]:
    """The device type ("cpu", "cuda") of every tensor in nested dicts, lists and tuples, in their order."""
    return [tensor.device.type for tensor in collect_tensors(state)]


def restore_devices(state: Any, types: list[str], device: torch.device) -> Any:
    """`state` with each tensor on the CPU or on `device`, as `device_types` found it: an optimizer that keeps its step
    counter on the CPU would wait for the GPU at every step if it came back there."""
    remaining = iter(types)

    def restore(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu() if next(remaining) == "cpu" else value.to(device)
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restore(item) for item in value]
        if isinstance(value, tuple):
            return tuple(restore(item) for item in value)
        return value

    return restore(state)
