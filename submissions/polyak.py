"""Polyak step sizes, which follow from the loss value of the batch.

ALR-SMAG: Wang, Johansson & Zhang 2023, "Generalized Polyak Step Size for First Order Optimization with Momentum",
arXiv:2305.12939, for stochastic moving-averaged gradient:

    d ← β d + g,   η_t = min{ η, (f - f*) / (c ‖d‖²) },   θ ← (1 - η_t λ) θ - η_t d

PSPS: Abdukhakimov, Xiang, Kamzolov & Takáč 2023, "Stochastic Gradient Descent with Preconditioned Polyak Step-size",
arXiv:2310.02093:

    θ ← θ - min{ (f - f*) / (c ‖g‖²_{B⁻¹}), η } B⁻¹ g,   ‖g‖²_{B⁻¹} = Σ_i g_i² / B_i

with B = max(|D|, α) and D one of: Hutchinson's estimate of the Hessian's diagonal, D ← β D + (1 - β) z ⊙ H z with signs
z = ±1 at every step (PSPSHutchinson); Adam's D = √v̂ or AdaGrad's D = √Σ g² (PSPS). Weight decay, which neither paper
has, is decoupled and takes the step size that was found.

`lr` is the cap η, `lower_bound` is f*. Defaults: SMAG β = 0.9, c = 1 and η = 0.1 (the released comparison of MoMo's
authors); PSPS c = 1/2, β = 0.999, α = 1e-4, and η = 1, which the paper leaves to tuning.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from harness.needs import Need
from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import GlobalRule, Group, inner_product


class LossRule(GlobalRule):
    """A rule that reads the loss of the batch; `loss` is set before each step."""

    loss: Tensor


class LossSubmission(OptimizerSubmission):
    """One gradient, and its loss handed to the rule."""

    def __init__(self, setup: Setup, rule: LossRule) -> None:
        self.rule = rule
        super().__init__(setup, [rule])

    def step(self, ctx: StepContext) -> None:
        self.rule.loss = self._gradient(ctx)
        self.update(ctx)


class ALRSMAG(LossSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        beta: float = 0.9,
        c: float = 1.0,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"lr": lr, "beta": beta, "c": c, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(setup, SMAGRule(setup.decay_groups(), own))


class PSPS(LossSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        preconditioner: str = "adam",
        beta: float = 0.999,
        alpha: float = 1e-4,
        c: float = 0.5,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if preconditioner not in ("adam", "adagrad"):
            raise ValueError(f"preconditioner={preconditioner}: must be adam or adagrad; PSPSHutchinson is the third")
        kind = AdaGradPolyakRule if preconditioner == "adagrad" else AdamPolyakRule
        own = {"lr": lr, "beta": beta, "alpha": alpha, "c": c, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(setup, kind(setup.decay_groups(), own))


class PSPSHutchinson(LossSubmission):
    needs = frozenset({Need.SECOND_DERIVATIVES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        beta: float = 0.999,
        alpha: float = 1e-4,
        c: float = 0.5,
        lower_bound: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"lr": lr, "beta": beta, "alpha": alpha, "c": c, "lower_bound": lower_bound, "weight_decay": weight_decay}
        self.hutchinson = HutchinsonPolyakRule(setup.decay_groups(), own)
        super().__init__(setup, self.hutchinson)

    def step(self, ctx: StepContext) -> None:
        self.rule.loss = self._gradient(ctx)
        generator = self.setup.device_generator
        z = [torch.randint(0, 2, p.shape, generator=generator, device=p.device).mul_(2).sub_(1).to(p.dtype)
             for p in self.setup.parameters]  # fmt: skip
        estimate = torch._foreach_mul(z, ctx.hessian_vector_product(z))
        self.hutchinson.estimates = dict(zip(self.setup.parameters, estimate, strict=True))
        self.update(ctx)


class SMAGRule(LossRule):
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        d = self.tensors(parameters, "momentum")
        torch._foreach_mul_(d, group["beta"])
        torch._foreach_add_(d, gradients)
        _polyak_step(self.loss, parameters, d, inner_product(d, d), group)


class PolyakRule(LossRule):
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        b = torch._foreach_abs(self.diagonal(parameters, gradients, group))
        torch._foreach_clamp_min_(b, group["alpha"])
        direction = list(torch._foreach_div(gradients, b))
        _polyak_step(self.loss, parameters, direction, inner_product(gradients, direction), group)

    @abstractmethod
    def diagonal(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        """D, brought up to date."""


class AdamPolyakRule(PolyakRule):
    def diagonal(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        v, beta = self.tensors(parameters, "exp_avg_sq"), group["beta"]
        torch._foreach_mul_(v, beta)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta)
        return list(torch._foreach_sqrt(torch._foreach_div(v, 1 - beta ** group["step"])))


class AdaGradPolyakRule(PolyakRule):
    def diagonal(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        total = self.tensors(parameters, "sum_sq")
        torch._foreach_addcmul_(total, gradients, gradients)
        return list(torch._foreach_sqrt(total))


class HutchinsonPolyakRule(PolyakRule):
    estimates: dict[Tensor, Tensor]
    """z ⊙ H z of every parameter; set before each step."""

    def diagonal(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> list[Tensor]:
        new = {p: self.estimates[p].to(g.dtype) for p, g in zip(parameters, gradients, strict=True)}
        d = self.tensors(parameters, "diagonal", lambda p: new[p].clone())
        torch._foreach_lerp_(d, [new[p] for p in parameters], 1 - group["beta"])
        return d


def _polyak_step(
    loss: Tensor, parameters: list[Tensor], direction: list[Tensor], squared_norm: Tensor, group: Group
) -> None:
    gap = (loss - group["lower_bound"]).clamp_min(0).to(squared_norm.dtype)
    tiny = torch.finfo(squared_norm.dtype).tiny
    size = (gap / (group["c"] * squared_norm).clamp_min(tiny)).clamp_max(group["lr"])
    if any(group["weight_decay"]):
        torch._foreach_mul_(parameters, [1 - size * decay for decay in group["weight_decay"]])
    torch._foreach_sub_(parameters, torch._foreach_mul(direction, size))
