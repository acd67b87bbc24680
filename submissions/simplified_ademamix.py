"""Simplified AdEMAMix: Morwani, Vyas, Zhang & Kakade 2025, "Connections between Schedule-Free Optimizers, AdEMAMix, and
Accelerated SGD Variants", arXiv:2502.02431. AdEMAMix with one momentum, a sum, to which the gradient itself is added:

    m ← β1 m + g,   v ← β2 v + (1 - β2) g²
    θ ← θ - η ((m + α g) / (√v̂ + ε) + λ θ)

m grows to 1/(1 - β1) gradients, so η is smaller than Adam's by about that factor. β1 may rise over the first steps from
`beta1_start`, so that its half-life grows linearly. State: m and v. Defaults: β = (0.99, 0.95), α = 0 (the paper: about
0 for small batches, 100 for large ones), ε = 1e-8.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_square_, root


class SimplifiedAdEMAMix(Rule):
    """Simplified AdEMAMix. alpha: α. beta1_steps: steps over which β1 rises from beta1_start; 0 for none."""

    elementwise = True
    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.99, 0.95),
        alpha: NonNegativeFloat = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        beta1_start: Annotated[float, Interval(gt=0, lt=1)] = 0.9,
        beta1_steps: NonNegativeInt = 0,
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters | {"beta1_start": beta1_start, "beta1_steps": beta1_steps})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta2, momentum, second_moment = bucket["betas"][1], bucket.state("momentum"), bucket.state("second_moment")
        torch._foreach_mul_(momentum, _rising_beta(bucket))
        torch._foreach_add_(momentum, bucket.g)
        average_square_(second_moment, bucket.g, beta2)
        direction = torch._foreach_add(momentum, bucket.g, alpha=bucket["alpha"])
        torch._foreach_div_(direction, root(second_moment, 1 - beta2**bucket.t, bucket["eps"]))
        return direction


def _rising_beta(bucket: Bucket) -> float:
    """β1 of this step: its half-life grows linearly, as AdEMAMix's does."""
    beta1, start, steps = bucket["betas"][0], bucket["beta1_start"], bucket["beta1_steps"]
    if bucket.t >= steps or start >= beta1:
        return float(beta1)
    share = bucket.t / steps
    half_life = (1 - share) * math.log(0.5) / math.log(start) + share * math.log(0.5) / math.log(beta1)
    return float(0.5 ** (1 / half_life))
