"""SGD with momentum and exponential random scaling: Zhang & Cutkosky 2024, "Random Scaling and Momentum for Non-smooth
Non-convex Optimization", arXiv:2405.09742. The momentum step is multiplied by a random number with mean 1:

    Δ ← β (Δ - η g)
    θ ← θ + s Δ - η λ θ                           s ~ Exp(1), one for all parameters

One state tensor per parameter. The paper tunes η and β, so the defaults are ours. It has no weight decay; here it is
decoupled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import OptimizerSubmission, Setup
from submissions.rule import Bucket, Rule, Tensors


class RandomScalingSGD(OptimizerSubmission):
    """SGD with momentum and random scaling as in the module docstring. momentum: β."""

    def __init__(self, setup: Setup, *, lr: float = 0.01, momentum: float = 0.99, weight_decay: float = 0.0) -> None:
        rule = RandomScalingRule(setup.decay_groups(), lr, momentum, weight_decay, setup.generator)
        super().__init__(setup, [rule])


class RandomScalingRule(Rule):
    """The update of the module docstring. generator: draws s, on the CPU."""

    elementwise = True
    small = 0
    buffers = ("momentum",)

    def __init__(
        self, params: ParamsT, lr: float, momentum: float, weight_decay: float, generator: torch.Generator
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.generator, self.scale = generator, 1.0

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        # Drawn on the CPU, so that the numbers are the same on every device.
        self.scale = float(torch.empty(()).exponential_(generator=self.generator))

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        # η is part of the momentum, so a schedule acts on the gradients as they come in.
        torch._foreach_sub_(momentum, bucket.g, alpha=bucket["lr"])
        torch._foreach_mul_(momentum, bucket["momentum"])
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        torch._foreach_mul_(bucket.theta, 1 - bucket["lr"] * bucket["weight_decay"])
        torch._foreach_add_(bucket.theta, direction, alpha=self.scale)
