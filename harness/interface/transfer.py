"""Copies from the host to the device of a trial."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`, without making the host wait for the work that a GPU still has to do.

    A workload's `batch` copies with it what it has computed on the CPU. On a CPU it returns the tensor itself.
    """
    if device.type == "cpu":
        return tensor
    # Out of pageable memory the driver would wait for all earlier work of the stream.
    return tensor.pin_memory().to(device, non_blocking=True)
