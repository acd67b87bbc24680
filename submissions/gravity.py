"""Gravity: Bahrami & Zadeh 2021, "Gravity Optimizer: a Kinematic Approach on Optimization in Deep Learning",
arXiv:2101.09192. The larger gradients of a tensor are damped, and the momentum's decay rate grows over the first steps:

    ζ = g / (1 + (g max|g|)²)
    β̂ = (β t + 1) / (t + 2)
    V ← β̂ V + (1 - β̂) ζ                           V ~ N(0, (α / η)²) at the start
    θ ← θ - η V

In the initial V, η is `lr` without the schedule. One state tensor per parameter. Defaults (paper): lr 0.1, α = 0.01,
β = 0.9. The paper has no weight decay; here it is decoupled.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import OptimizerSubmission, Setup
from submissions.rule import Bucket, Rule, Tensors, average_


class Gravity(OptimizerSubmission):
    """Gravity as in the module docstring. alpha: α. beta: β."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        alpha: NonNegativeFloat = 0.01,
        beta: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        rule = GravityRule(setup.decay_groups(), lr, alpha, beta, weight_decay, setup.device_generator)
        super().__init__(setup, [rule])


class GravityRule(Rule):
    """The update of the module docstring. generator: of the initial velocities, on the parameters' device."""

    def __init__(
        self, params: ParamsT, lr: float, alpha: float, beta: float, weight_decay: float, generator: torch.Generator
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})
        self.deviation, self.generator = alpha / lr, generator

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"velocity": torch.empty_like(theta).normal_(std=self.deviation, generator=self.generator)}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        velocity = bucket.state("velocity")
        # An empty tensor has no maximum; its sum is 0.
        max_gradients = [g.abs().amax() if g.numel() else g.sum() for g in bucket.g]
        damping = torch._foreach_mul(bucket.g, max_gradients)
        torch._foreach_mul_(damping, damping)
        torch._foreach_add_(damping, 1.0)
        average_(velocity, torch._foreach_div(bucket.g, damping), (bucket["beta"] * bucket.t + 1) / (bucket.t + 2))
        return velocity
