"""Prodigy: Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
Algorithm 4. Adam whose step size d grows to an estimate of the distance from the start θ₀ to the solution, over all
parameters together:

    m ← β1 m + (1 - β1) d g
    v ← β2 v + (1 - β2) d² g²
    r ← √β2 r + η d² ⟨g, θ₀ - θ⟩
    s ← √β2 s + η d² g
    θ ← θ - η d (m / (√v + d ε) + λ θ)
    d ← max(d, c r / ‖s‖₁)

(The paper has a factor 1 - √β2 before both d², which cancels.) η is the schedule's factor, as lr is 1. Four state
tensors per parameter: m, v, s, θ₀. Defaults (paper and package): β = (0.9, 0.999), ε = 1e-8, initial d = 1e-6, c = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, root


class Prodigy(Rule):
    """Prodigy: the update of the module docstring. initial_d: d at the first step. d_coefficient: c."""

    buffers = ("momentum", "second_moment", "gradient_sum")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        initial_d: PositiveFloat = 1e-6,
        d_coefficient: PositiveFloat = 1.0,
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "initial_d": initial_d}
        super().__init__(params, hyperparameters | {"d_coefficient": d_coefficient, "d": initial_d, "r": 0.0})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"start": theta.clone()}

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        """Update m, v, s and r, and compute the next d. The step itself uses the present d, kept as `last_d`."""
        if not buckets:
            return
        # All groups hold the same d and r.
        shared = self.param_groups[0]
        d: float = shared["d"]
        beta1, beta2 = shared["betas"]
        products: list[Tensor] = []
        s_norms: list[Tensor] = []
        for bucket in buckets:
            s = bucket.state("gradient_sum")
            momentum, second_moment = bucket.state("momentum"), bucket.state("second_moment")
            # The factors d and d² are in the scalars, which saves a copy of the gradients.
            torch._foreach_mul_(momentum, beta1)
            torch._foreach_add_(momentum, bucket.g, alpha=(1 - beta1) * d)
            torch._foreach_mul_(second_moment, beta2)
            torch._foreach_addcmul_(second_moment, bucket.g, bucket.g, value=(1 - beta2) * d**2)
            products += [
                bucket["lr"] * d**2 * torch.vdot(g.flatten(), (start - theta).flatten())
                for g, start, theta in zip(bucket.g, bucket.state("start"), bucket.theta, strict=True)
            ]
            torch._foreach_mul_(s, beta2**0.5)
            torch._foreach_add_(s, bucket.g, alpha=bucket["lr"] * d**2)
            s_norms += torch._foreach_norm(s, 1)
        r = beta2**0.5 * shared["r"] + float(torch.stack(products).sum())
        s_norm = float(torch.stack(s_norms).sum())
        # All gradients so far may be zero, or the learning rate.
        next_d = max(d, shared["d_coefficient"] * r / s_norm) if s_norm else d
        for group in self.param_groups:
            group |= {"last_d": d, "d": next_d, "r": r}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return torch._foreach_div(
            bucket.state("momentum"), root(bucket.state("second_moment"), 1.0, bucket["last_d"] * bucket["eps"])
        )

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        rate = bucket["lr"] * bucket["last_d"]
        torch._foreach_mul_(bucket.theta, 1 - rate * bucket["weight_decay"])
        torch._foreach_add_(bucket.theta, direction, alpha=-rate)
