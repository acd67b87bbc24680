"""SGDW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 1. With the
schedule's factor s and the learning rate η = s α:

    m ← β m + η g
    θ ← θ - m - s λ θ

Weight decay does not depend on the initial learning rate α: λ here is α times the λ of other rules. One state tensor
per parameter. The paper sets β = 0.9 and tunes α and λ.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from submissions.rule import Rule, Slice, Tensors


class SGDW(Rule):
    buffers = ("momentum",)

    def __init__(self, params: ParamsT, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def direction(self, at: Slice) -> Tensors:
        momentum = at.state("momentum")
        torch._foreach_mul_(momentum, at["momentum"])
        torch._foreach_add_(momentum, at.g, alpha=at["lr"])
        return momentum

    def apply(self, at: Slice, direction: Tensors) -> None:
        torch._foreach_mul_(at.theta, 1 - at["lr"] / self.defaults["lr"] * at["weight_decay"])
        torch._foreach_sub_(at.theta, direction)
