"""Lion (EvoLved Sign Momentum): Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675,
Algorithm 2. With gradient g, momentum m, learning rate η and weight decay λ:

    c = β1 m + (1 - β1) g
    θ ← θ - η (sign(c) + λ θ)
    m ← β2 m + (1 - β2) g

One state tensor per parameter. Defaults: β = (0.9, 0.99). The paper advises a learning rate 3 to 10 times smaller and a
weight decay 3 to 10 times larger than AdamW's.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_


class Lion(Rule):
    """Lion: the update of the module docstring."""

    elementwise = True
    small = 0
    buffers = ("momentum",)

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum = bucket.state("momentum")
        # From the old momentum, so before its update.
        direction = torch._foreach_lerp(momentum, bucket.g, 1 - beta1)
        torch._foreach_sign_(direction)
        average_(momentum, bucket.g, beta2)
        return direction
