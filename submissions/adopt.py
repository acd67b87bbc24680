"""ADOPT: Taniguchi et al. 2024, "ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate",
arXiv:2411.02853, Algorithm 2 with clipping. The gradient is divided by the root of the previous second moment and then
averaged:

    v ← g²                                        at the first step, which leaves θ unchanged
    m ← β1 m + (1 - β1) clip(g / max(√v, ε), ±(t - 1)^¼)
    θ ← θ - η (m + λ θ)
    v ← β2 v + (1 - β2) g²

Two state tensors per parameter. Defaults (paper and code): β = (0.9, 0.9999), ε = 1e-6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_, average_square_


class Adopt(Rule):
    """ADOPT with decoupled weight decay: the update of the module docstring."""

    elementwise = True
    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"second_moment": g.square()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum, second_moment = bucket.state("momentum"), bucket.state("second_moment")
        denominator = torch._foreach_sqrt(second_moment)
        torch._foreach_clamp_min_(denominator, bucket["eps"])
        normalised = torch._foreach_div(bucket.g, denominator)
        # At the first step the bound is 0, so the momentum stays zero.
        bound = (bucket.t - 1) ** 0.25
        torch._foreach_clamp_min_(normalised, -bound)
        torch._foreach_clamp_max_(normalised, bound)
        average_(momentum, normalised, beta1)
        # Only now, so that the division above does not see the present gradient.
        average_square_(second_moment, bucket.g, beta2)
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # The first step has no weight decay either.
        if bucket.t > 1:
            super().apply(bucket, direction)
