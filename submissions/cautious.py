"""Cautious optimizers: Liang et al. 2024, "Cautious Optimizers: Improving Training with One Line of Code",
arXiv:2411.16085, Algorithm 1. The coordinates of a direction u whose sign differs from the gradient's are set to zero,
and the others are scaled up, for each tensor of d numbers:

    φ = 1 where u g > 0, else 0
    u ← u φ d / (‖φ‖₁ + 1)

The authors' code has max(mean(φ), 1e-3) instead of (‖φ‖₁ + 1) / d. State and defaults are those of AdamW (two tensors
per parameter) or Lion (one).
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.lion import Lion
from submissions.rule import Bucket, Rule, Tensors, adam


def mask_direction(direction: Tensors, g: Tensors) -> Tensors:
    """The update of u in the module docstring; new tensors, parallel to the direction and the gradients."""
    masks = [(u * gradient > 0).to(u.dtype) for u, gradient in zip(direction, g, strict=True)]
    # The 1 of the paper also keeps the scale finite where no sign agrees.
    scales = [mask.numel() / (mask.sum() + 1) for mask in masks]
    return torch._foreach_mul(torch._foreach_mul(direction, masks), scales)


class CautiousAdamW(Rule):
    """AdamW with the masked direction of the module docstring."""

    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return mask_direction(adam(bucket), bucket.g)


class CautiousLion(Lion):
    """Lion with the masked direction of the module docstring."""

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return mask_direction(super().direction(bucket), bucket.g)
