"""MoMo and MoMo-Adam: Schaipp, Ohana, Eickenberg, Defazio & Gower 2024, "MoMo: Momentum Models for Adaptive Learning
Rates", arXiv:2305.07583, Algorithms 1 and 4. A Polyak step size for a model of the loss that averages past batches:

    d ← β d + (1 - β) g,   f̄ ← β f̄ + (1 - β) f,   γ ← β γ + (1 - β) ⟨g, θ⟩
    τ = min{ η/ρ, (f̄ - ρ f* - γ + Σ_i d_i θ_i / (1 + η λ_i))₊ / Σ_i (d_i² / D_i) / (1 + η λ_i) }
    θ_i ← (θ_i - τ d_i / D_i) / (1 + η λ_i)

MoMo: D = 1, averages that start from the first batch, ρ = 1. MoMo-Adam: D = √v̂ + ε, averages from zero, ρ = 1 - β1^t.
The sums carry 1 + ηλ inside so that groups may differ in λ; where all have one λ this is the paper's formula. `lr` is
the cap η on the step size, `lower_bound` is f*. State: d, and v for MoMo-Adam. Defaults: MoMo η = 1, β = 0.9;
MoMo-Adam η = 1e-2, β = (0.9, 0.999), ε = 1e-8; f* = 0, λ = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.submission import Setup
from submissions.list_rule import Group, inner_product, working
from submissions.polyak import LossRule, LossSubmission


class MoMo(LossSubmission):
    def __init__(
        self, setup: Setup, *, lr: float = 1.0, beta: float = 0.9, lower_bound: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        own = {"lr": lr, "beta": beta, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(setup, MoMoRule(setup.decay_groups(), own))


class MoMoAdam(LossSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(setup, MoMoAdamRule(setup.decay_groups(), own))


class _ModelRule(LossRule):
    def move(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        d: list[Tensor],
        metric: list[Tensor] | None,
        beta: float,
        rho: float,
        group: Group,
    ) -> None:
        """Average f and ⟨g, θ⟩, then step along the averaged gradients `d`; `metric` is D, None where it is 1.

        rho: 1 for averages that start from the first batch, 1 - β^t for those that start from zero.
        """
        theta, lr = working(parameters), group["lr"]
        inner = inner_product(gradients, theta)
        loss = self.loss.to(inner.dtype)
        start = 1.0 if rho == 1 else 0.0
        loss_average = self.shared("loss", lambda: loss * start).lerp_(loss, 1 - beta)
        gamma = self.shared("inner", lambda: inner * start).lerp_(inner, 1 - beta)
        shrink = [1 / (1 + lr * decay) for decay in group["weight_decay"]]
        scaled = list(d) if metric is None else list(torch._foreach_div(d, metric))
        shrunk = torch._foreach_mul(d, shrink)
        gap = loss_average - rho * group["lower_bound"] - gamma + inner_product(shrunk, theta)
        size = inner_product(shrunk, scaled)
        tau = (gap.clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(lr / rho)
        torch._foreach_sub_(parameters, torch._foreach_mul(scaled, tau))
        torch._foreach_mul_(parameters, shrink)


class MoMoRule(_ModelRule):
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        first = dict(zip(parameters, gradients, strict=True))
        d = self.tensors(parameters, "momentum", lambda p: first[p].clone())
        torch._foreach_lerp_(d, gradients, 1 - group["beta"])
        self.move(parameters, gradients, d, None, group["beta"], 1.0, group)


class MoMoAdamRule(_ModelRule):
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        d, v = self.tensors(parameters, "momentum"), self.tensors(parameters, "exp_avg_sq")
        torch._foreach_lerp_(d, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        metric = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**step))
        torch._foreach_add_(metric, group["eps"])
        self.move(parameters, gradients, d, list(metric), beta1, 1 - beta1**step, group)
