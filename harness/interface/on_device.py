"""Work on a device that does not make the host wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`, without waiting for the work that a GPU still has to do.

    A workload's `batch` copies with it what it has computed on the CPU. On a CPU it returns the tensor itself.
    """
    if device.type == "cpu":
        return tensor
    # Out of pageable memory the driver would wait for all earlier work of the stream.
    return tensor.pin_memory().to(device, non_blocking=True)


def sample_classes(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One class for each row of `probabilities` [n, classes] (which need not sum to 1), drawn with them: int64 [n].

    The numbers of torch.multinomial to the bit, without its checks of the values, which wait for a GPU. Each class
    waits for a time of Exponential(1) / p; the first one is drawn.
    """
    times = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return torch.div(probabilities, times, out=times).argmax(-1)
