"""diffGrad: Dubey et al. 2019, "diffGrad: An Optimization Method for Convolutional Neural Networks", arXiv:1909.11015.
Adam with smaller steps where the gradient changes little:

    ξ = sigmoid(|g₋₁ - g|)                        g₋₁ = 0 at the first step
    θ ← θ - η (ξ m̂ / (√v̂ + ε) + λ θ)

Three state tensors per parameter. Defaults: Adam's. The paper has no weight decay; here it is decoupled.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class DiffGrad(Rule):
    """diffGrad with decoupled weight decay: the update of the module docstring."""

    elementwise = True
    buffers = ("momentum", "second_moment", "last_gradient")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        last = bucket.state("last_gradient")
        # The difference first: the copy overwrites the last gradient.
        friction = torch._foreach_sub(last, bucket.g)
        torch._foreach_copy_(last, bucket.g)
        torch._foreach_abs_(friction)
        torch._foreach_sigmoid_(friction)
        return torch._foreach_mul(adam(bucket), friction)
