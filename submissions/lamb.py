"""LAMB: You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962,
Algorithm 2. Adam's direction with weight decay, rescaled for each tensor to the norm of its weights:

    u = m̂ / (√v̂ + ε) + λ θ
    θ ← θ - η (‖θ‖ / ‖u‖) u                       ratio 1 where either norm is zero

Two state tensors per parameter. Defaults (paper): β = (0.9, 0.999), ε = 1e-6, λ = 0.01.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class Lamb(Rule):
    """LAMB: the update of the module docstring."""

    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        direction = torch._foreach_add(adam(bucket), bucket.theta, alpha=bucket["weight_decay"])
        theta_norms, u_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (bucket.theta, direction))
        ratios = torch.where((theta_norms > 0) & (u_norms > 0), theta_norms / u_norms, 1.0)
        return torch._foreach_mul(direction, ratios.unbind())

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # Weight decay is in the direction already.
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
