"""Functions, methods and classes that a submission replaces in torch, in Python or in the harness.

A function that is replaced in its own process gains a submission nothing that a judge measures, but it may train
another model than the workload's, and count wrongly what is counted there.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

Snapshot = dict[str, Any]
"""Callables by their dotted name."""

MAX_LISTED = 20
_PACKAGES = ("harness.", "workloads.")


def snapshot() -> Snapshot:
    """All callables of the harness, of the workloads that are loaded, and of torch's and Python's most used modules."""
    callables: Snapshot = {}
    watched = {"time": time, "torch": torch, "torch.nn.functional": torch.nn.functional}
    watched |= {name: module for name, module in sys.modules.items() if name.startswith(_PACKAGES) and module}
    for name, module in watched.items():
        for key, value in list(vars(module).items()):
            if callable(value):
                callables[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                callables |= {f"{name}.{key}.{part}": item for part, item in vars(value).items() if callable(item)}
    for cls in (torch.Tensor, torch.nn.Module):
        callables |= {f"{cls.__name__}.{key}": item for key, item in vars(cls).items() if callable(item)}
    return callables


def find_patches(before: Snapshot) -> list[str]:
    """The names under which another callable stands now than in `before`, sorted; at most `MAX_LISTED`."""
    now = snapshot()
    return sorted(name for name, value in before.items() if name in now and now[name] is not value)[:MAX_LISTED]
