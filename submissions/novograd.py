"""NovoGrad: Ginsburg et al. 2019, "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep
Networks", arXiv:1905.11286, Algorithm 1. Gradients are normalised per tensor; weight decay is part of the momentum:

    v ← β2 v + (1 - β2) ‖g‖²                      v = ‖g‖² at the first step
    m ← β1 m + g / (√v + ε) + λ θ
    θ ← θ - η m

One state tensor and one number per parameter. Defaults (paper): β = (0.95, 0.98), lr near 0.01, ε = 1e-8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_square_, root


class NovoGrad(Rule):
    """NovoGrad: the update of the module docstring."""

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"second_moment": g.square().sum()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum, second_moment = bucket.state("momentum"), bucket.state("second_moment")
        # At the first step v is ‖g‖² already, and the average of two equal numbers leaves it there.
        average_square_(second_moment, torch._foreach_norm(bucket.g), beta2)
        torch._foreach_mul_(momentum, beta1)
        torch._foreach_add_(momentum, torch._foreach_div(bucket.g, root(second_moment, 1.0, bucket["eps"])))
        torch._foreach_add_(momentum, bucket.theta, alpha=bucket["weight_decay"])
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
