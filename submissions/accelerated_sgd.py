"""Accelerated SGD: Jain et al. 2017, "Accelerating Stochastic Gradient Descent for Least Squares Regression",
arXiv:1704.08227, in the form of Kidambi et al. 2018, arXiv:1803.05591, Algorithm 3. A second sequence w takes long
steps:

    α = 1 - ξ δ² / κ      (ξ: statistical advantage, κ: long step over short step, δ: 0.7)
    w ← α w + (1 - α) (θ - (κ η / δ) g)
    θ ← (δ (θ - η g) + (1 - α) w) / (δ + 1 - α)

w starts at θ. One state tensor per parameter. Defaults (Kidambi et al., paper and code): κ = 1000, ξ = 10, δ = 0.7.
Weight decay is part of the gradient, as in their experiments.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class AcceleratedSGD(Rule):
    """Accelerated SGD: the update of the module docstring.

    long_step: κ. advantage: ξ, at most √κ. delta: δ.
    """

    elementwise = True
    small = 0

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        long_step: Annotated[float, Ge(1)] = 1000.0,
        advantage: Annotated[float, Ge(1)] = 10.0,
        delta: Annotated[float, Interval(gt=0, lt=1)] = 0.7,
        weight_decay: float = 0.0,
    ) -> None:
        if advantage > long_step**0.5:
            raise ValueError(
                f"advantage={advantage}: must be at most sqrt(long_step)={long_step**0.5:g}; lower it, or raise "
                "long_step"
            )
        hyperparameters = {"lr": lr, "long_step": long_step, "advantage": advantage, "delta": delta}
        super().__init__(params, hyperparameters | {"weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"long_sequence": theta.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return torch._foreach_add(bucket.g, bucket.theta, alpha=bucket["weight_decay"])

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        lr, kappa, delta, w = bucket["lr"], bucket["long_step"], bucket["delta"], bucket.state("long_sequence")
        # 1 - α, the weight of θ in w.
        weight = bucket["advantage"] * delta**2 / kappa
        # w moves first: it needs θ before the step.
        torch._foreach_lerp_(w, bucket.theta, weight)
        torch._foreach_add_(w, direction, alpha=-weight * kappa * lr / delta)
        torch._foreach_add_(bucket.theta, direction, alpha=-lr)
        torch._foreach_lerp_(bucket.theta, w, weight / (delta + weight))
