"""Layers whose weight multiplies vectors, and these vectors: what curvature in Kronecker factors is made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def has_patches(layer: nn.Module) -> bool:
    """Whether a layer multiplies rows of its weight by patches of its inputs: linear layers and convolutions, but no
    grouped ones."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def patches(inputs: Tensor, layer: nn.Module) -> Tensor:
    """What the rows of a layer's weight are multiplied by, [positions, columns], from its inputs [examples, ...]."""
    if isinstance(layer, nn.Conv2d):
        inputs = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # type: ignore[arg-type]
    return inputs.reshape(-1, inputs.shape[-1])


def outputs_by_position(values: Tensor, layer: nn.Module) -> Tensor:
    """Outputs of a layer, or gradients with respect to them, as [positions, rows]."""
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    return values.reshape(-1, values.shape[-1])
