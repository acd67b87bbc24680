"""Prodigy: Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
Algorithm 4. Adam at a step size d that grows to an estimate of the distance from the start θ₀ to the solution, over all
parameters together:

    m ← β1 m + (1 - β1) d g
    v ← β2 v + (1 - β2) d² g²
    r ← √β2 r + η d² ⟨g, θ₀ - θ⟩
    s ← √β2 s + η d² g
    θ ← θ - η d (m / (√v + d ε) + λ θ)
    d ← max(d, c r / ‖s‖₁)

(The paper's 1 - √β2 before both d² cancels.) η is the schedule's factor, lr 1. Four state tensors per parameter: m, v,
s, θ₀. Defaults (paper and package): β = (0.9, 0.999), ε = 1e-8, d = 1e-6 at the start, c = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT

from submissions.rule import Rule, Slice, Tensors, root


class Prodigy(Rule):
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

    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"start": theta.clone()}

    def survey(self, slices: Sequence[Slice]) -> None:
        """Update the averages, and find the next d; the step itself is made with the present one."""
        if not slices:
            return
        first = self.param_groups[0]
        d: float = first["d"]
        beta1, beta2 = first["betas"]
        parts: list[Tensor] = []
        sums: list[Tensor] = []
        for at in slices:
            s = at.state("gradient_sum")
            momentum, second_moment = at.state("momentum"), at.state("second_moment")
            torch._foreach_mul_(momentum, beta1)
            torch._foreach_add_(momentum, at.g, alpha=(1 - beta1) * d)
            torch._foreach_mul_(second_moment, beta2)
            torch._foreach_addcmul_(second_moment, at.g, at.g, value=(1 - beta2) * d**2)
            parts += [
                at["lr"] * d**2 * torch.vdot(g.flatten(), (start - theta).flatten())
                for g, start, theta in zip(at.g, at.state("start"), at.theta, strict=True)
            ]
            torch._foreach_mul_(s, beta2**0.5)
            torch._foreach_add_(s, at.g, alpha=at["lr"] * d**2)
            sums += torch._foreach_norm(s, 1)
        r = beta2**0.5 * first["r"] + float(torch.stack(parts).sum())
        total = float(torch.stack(sums).sum())
        next_d = max(d, first["d_coefficient"] * r / total) if total else d
        for group in self.param_groups:
            group |= {"last_d": d, "d": next_d, "r": r}

    def direction(self, at: Slice) -> Tensors:
        return torch._foreach_div(at.state("momentum"), root(at.state("second_moment"), 1.0, at["last_d"] * at["eps"]))

    def apply(self, at: Slice, direction: Tensors) -> None:
        rate = at["lr"] * at["last_d"]
        torch._foreach_mul_(at.theta, 1 - rate * at["weight_decay"])
        torch._foreach_add_(at.theta, direction, alpha=-rate)
