"""SGDW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 1. With the
schedule's factor s and the learning rate η = s α:

    m ← β m + η g
    θ ← θ - m - s λ θ

Weight decay does not depend on the initial learning rate α: λ is α times the λ of other rules. One state tensor per
parameter. The paper sets β = 0.9 and tunes α and λ.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class SGDW(Rule):
    """SGDW: the update of the module docstring. lr: α. momentum: β."""

    elementwise = True
    small = 0
    buffers = ("momentum",)

    def __init__(self, params: ParamsT, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        torch._foreach_mul_(momentum, bucket["momentum"])
        torch._foreach_add_(momentum, bucket.g, alpha=bucket["lr"])
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # The schedule's factor s, from the scheduled and the initial learning rate. The momentum contains η already.
        factor = bucket["lr"] / self.defaults["lr"]
        torch._foreach_mul_(bucket.theta, 1 - factor * bucket["weight_decay"])
        torch._foreach_sub_(bucket.theta, direction)
