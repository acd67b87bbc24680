"""The names of AlgoPerf's `pytorch_utils` that submissions use; see `submissions.algoperf.package`."""

from __future__ import annotations

import os

import torch

_device = torch.device("cpu")


def set_device(device: torch.device) -> None:
    """Let `pytorch_setup` tell of this device from now on."""
    global _device
    _device = device


def pytorch_setup() -> tuple[bool, int, torch.device, int]:
    """Whether several processes share the trial, the number of this one on its machine, its device, and the number of
    GPUs."""
    # A launcher may also start one process.
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = int(os.environ.get("LOCAL_RANK", "0")) if shared else 0
    return shared, rank, _device, torch.cuda.device_count()
