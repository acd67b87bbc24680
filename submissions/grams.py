"""Grams: Cao et al. 2024, "Grams: Gradient Descent with Adaptive Momentum Scaling", arXiv:2412.17107, Algorithm 1.
The magnitude of the step is Adam's and its sign is the gradient's:

    θ ← θ - η (sign(g) |m̂ / (√v̂ + ε)| + λ θ)

Two state tensors per parameter. Defaults: Adam's, with ε = 1e-6 (the authors' code).
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class Grams(Rule):
    """Grams with decoupled weight decay: the update of the module docstring."""

    elementwise = True
    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        # `adam` returns new tensors, which may be changed in place.
        direction = adam(bucket)
        torch._foreach_abs_(direction)
        torch._foreach_mul_(direction, torch._foreach_sign(bucket.g))
        return direction
