"""Adan (adaptive Nesterov momentum): Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing
Deep Models", arXiv:2208.06677, Algorithm 1. With the change of the gradient δ = g - g₋₁ (0 at the first step):

    m ← β1 m + (1 - β1) g
    v ← β2 v + (1 - β2) δ
    n ← β3 n + (1 - β3) (g + β2 δ)²
    θ ← (θ - η (m̂ + β2 v̂) / (√n̂ + ε)) / (1 + η λ)

As in the authors' code β are decay rates (1 - β of the paper), and m̂, v̂, n̂ are bias-corrected; the paper's algorithm
starts m and n at the first gradient instead. There are no restarts. Four state tensors per parameter. Defaults:
β = (0.98, 0.92, 0.99), ε = 1e-8, λ = 0.02 (the paper's for ViTs; the authors' code has 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, root


class Adan(Rule):
    """Adan: the update of the module docstring."""

    elementwise = True
    buffers = ("momentum", "difference", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.02,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"last_gradient": g.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2, beta3 = bucket["betas"]
        m, v, n, last = (bucket.state(name) for name in ("momentum", "difference", "second_moment", "last_gradient"))
        average_(m, bucket.g, beta1)
        # To save temporary tensors, the buffer of the last gradient holds -δ, then g + β2 δ, and finally the new one.
        torch._foreach_sub_(last, bucket.g)
        torch._foreach_mul_(v, beta2)
        torch._foreach_add_(v, last, alpha=beta2 - 1)
        torch._foreach_mul_(last, -beta2)
        torch._foreach_add_(last, bucket.g)
        average_square_(n, last, beta3)
        torch._foreach_copy_(last, bucket.g)
        correction1 = 1 - beta1**bucket.t
        direction = torch._foreach_add(m, v, alpha=beta2 * correction1 / (1 - beta2**bucket.t))
        torch._foreach_div_(direction, root(n, 1 - beta3**bucket.t, bucket["eps"], scale=correction1))
        return direction

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # The proximal form of weight decay: a division after the step.
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
        torch._foreach_div_(bucket.theta, 1 + bucket["lr"] * bucket["weight_decay"])
