"""LARS: You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, Algorithm 1.
SGD with momentum whose learning rate is, for each tensor, a share of its norm over its gradient's:

    r = τ ‖θ‖ / (‖g‖ + λ ‖θ‖),   m ← μ m + η r (g + λ θ),   θ ← θ - m

with r = 1 where either norm is zero, and for groups without weight decay (norms and biases with `no_decay`), which
later work leaves out of the rule as well. m holds the learning rate, as in the paper. State: m. Defaults: τ = 0.001, μ
= 0.9 (paper); λ = 5e-4.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class LARS(Rule):
    """LARS: the update of the module docstring. trust: τ."""

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        trust: PositiveFloat = 1e-3,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        decay, momentum = bucket["weight_decay"], bucket.state("momentum")
        direction = torch._foreach_add(bucket.g, bucket.theta, alpha=decay)
        if decay:
            weights, gradients = (torch.stack(torch._foreach_norm(tensors)) for tensors in (bucket.theta, bucket.g))
            ratio = bucket["trust"] * weights / (gradients + decay * weights)
            trusted = torch.where((weights > 0) & (gradients > 0), ratio, 1.0)
            torch._foreach_mul_(direction, trusted.unbind())
        torch._foreach_mul_(momentum, bucket["momentum"])
        torch._foreach_add_(momentum, direction, alpha=bucket["lr"])
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # Learning rate and weight decay are in the momentum already.
        torch._foreach_sub_(bucket.theta, direction)
