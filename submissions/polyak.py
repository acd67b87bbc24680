"""Polyak step sizes: they depend on the loss value of the batch.

ALR-SMAG: Wang, Johansson & Zhang 2023, "Generalized Polyak Step Size for First Order Optimization with Momentum",
arXiv:2305.12939, for the stochastic moving-averaged gradient:

    d ← β d + g,   η_t = min{ η, (f - f*) / (c ‖d‖²) },   θ ← (1 - η_t λ) θ - η_t d

PSPS: Abdukhakimov, Xiang, Kamzolov & Takáč 2023, "Stochastic Gradient Descent with Preconditioned Polyak Step-size",
arXiv:2310.02093:

    θ ← θ - min{ (f - f*) / (c ‖g‖²_{B⁻¹}), η } B⁻¹ g,   ‖g‖²_{B⁻¹} = Σ_i g_i² / B_i

with B = max(|D|, α) and D one of: Hutchinson's estimate of the Hessian's diagonal, D ← β D + (1 - β) z ⊙ H z with
random signs z = ±1 at every step (PSPSHutchinson); Adam's D = √v̂ or AdaGrad's D = √Σ g² (PSPS). Neither paper has
weight decay; here it is decoupled and multiplied by the step size.

`lr` is the cap η, `lower_bound` is f*; inner products are over all parameters. State per parameter: d, or D (its v or
Σ g²). Defaults: SMAG β = 0.9, c = 1 and η = 0.1 (the released comparison of MoMo's authors); PSPS β = 0.999 and
α = 1e-4 (the PSPS authors' experiments), c = 1/2 (SPS, Loizou et al. 2021), and η = 1, which the paper tunes. Two
departures: D starts at its first estimate, while the authors average several before the first step; and α also bounds
the D of Adam and AdaGrad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import FiniteFloat, PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, inner_product, root

PRECONDITIONERS = ("adam", "adagrad")


class LossSubmission(OptimizerSubmission):
    """The default step, with the loss of the batch handed to the rule."""

    def __init__(self, setup: Setup, rule: PolyakRule) -> None:
        self.rule = rule
        super().__init__(setup, [rule])

    @override
    def step(self, ctx: StepContext) -> None:
        self.rule.loss = self._gradient(ctx)
        self.update(ctx)
        # Nothing of this step is kept.
        self.rule.loss = 0.0


class ALRSMAG(LossSubmission):
    """ALR-SMAG: the first equation of the module docstring. lr: η. lower_bound: f*."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        beta: float = 0.9,
        c: PositiveFloat = 1.0,
        lower_bound: FiniteFloat = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        hyperparameters = {"lr": lr, "beta": beta, "c": c, "lower_bound": lower_bound, "weight_decay": weight_decay}
        super().__init__(setup, SMAGRule(setup.decay_groups(), hyperparameters))


class PSPS(LossSubmission):
    """PSPS with Adam's or AdaGrad's D. lr: η. alpha: α, the lower bound of B. lower_bound: f*."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        preconditioner: str = "adam",
        beta: float = 0.999,
        alpha: PositiveFloat = 1e-4,
        c: PositiveFloat = 0.5,
        lower_bound: FiniteFloat = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if preconditioner not in PRECONDITIONERS:
            raise ValueError(
                f"preconditioner={preconditioner}: must be adam or adagrad; for Hutchinson's estimate use "
                "optimizer.class_path=submissions.polyak.PSPSHutchinson"
            )
        rule_class = AdaGradPolyakRule if preconditioner == "adagrad" else AdamPolyakRule
        hyperparameters = {"lr": lr, "beta": beta, "alpha": alpha, "c": c, "lower_bound": lower_bound}
        super().__init__(setup, rule_class(setup.decay_groups(), hyperparameters | {"weight_decay": weight_decay}))


class PSPSHutchinson(LossSubmission):
    """PSPS with Hutchinson's estimate of the Hessian's diagonal; hyperparameters as of `PSPS`."""

    needs = frozenset({Need.SECOND_DERIVATIVES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        beta: float = 0.999,
        alpha: PositiveFloat = 1e-4,
        c: PositiveFloat = 0.5,
        lower_bound: FiniteFloat = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        hyperparameters = {"lr": lr, "beta": beta, "alpha": alpha, "c": c, "lower_bound": lower_bound}
        self.hutchinson = HutchinsonPolyakRule(setup.decay_groups(), hyperparameters | {"weight_decay": weight_decay})
        super().__init__(setup, self.hutchinson)

    @override
    def step(self, ctx: StepContext) -> None:
        # The gradient first: only the first pass of a step updates BatchNorm's statistics.
        self.rule.loss = self._gradient(ctx)
        generator = self.setup.device_generator
        z = [torch.randint(0, 2, p.shape, generator=generator, device=p.device).mul_(2).sub_(1).to(p.dtype)
             for p in self.setup.parameters]  # fmt: skip
        estimate = torch._foreach_mul(z, ctx.hessian_vector_product(z))
        self.hutchinson.estimates = dict(zip(self.setup.parameters, estimate, strict=True))
        self.update(ctx)
        # Nothing of this step is kept.
        self.rule.loss, self.hutchinson.estimates = 0.0, {}


class PolyakRule(Rule):
    """θ ← (1 - η_t λ) θ - η_t u with the Polyak step size η_t = min{ η, (f - f*) / (c ‖u‖²) } for all parameters.

    A subclass defines u and its norm. Set `loss`, the loss of the batch (a scalar), before each step.
    """

    loss: Tensor | float

    def direction_and_squared_norm(self, bucket: Bucket) -> tuple[Tensors, Tensor]:
        """The direction u of a bucket, and its squared norm in the metric of the rule (a scalar)."""
        raise NotImplementedError

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        directions = [self.direction_and_squared_norm(bucket) for bucket in buckets]
        for bucket, (direction, _) in zip(buckets, directions, strict=True):
            squared_norm = torch.stack([squared_norm for _, squared_norm in directions]).sum()
            # Stays on the device: nothing waits for it.
            gap = torch.as_tensor(self.loss - bucket["lower_bound"]).clamp_min(0)
            step_size = gap / (bucket["c"] * squared_norm).clamp_min(torch.finfo(squared_norm.dtype).tiny)
            bucket.scratch.update(direction=direction, step_size=step_size.clamp_max(bucket["lr"]))

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        direction: Tensors = bucket.scratch["direction"]
        return direction

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        step_size = bucket.scratch["step_size"]
        if bucket["weight_decay"]:
            torch._foreach_mul_(bucket.theta, 1 - step_size * bucket["weight_decay"])
        torch._foreach_sub_(bucket.theta, torch._foreach_mul(direction, step_size))


class SMAGRule(PolyakRule):
    """u = d ← β d + g, with the Euclidean norm."""

    buffers = ("momentum",)

    @override
    def direction_and_squared_norm(self, bucket: Bucket) -> tuple[Tensors, Tensor]:
        d = bucket.state("momentum")
        torch._foreach_mul_(d, bucket["beta"])
        torch._foreach_add_(d, bucket.g)
        return d, inner_product(d, d)


class PreconditionedPolyakRule(PolyakRule):
    """u = B⁻¹ g with the norm ‖g‖_{B⁻¹}. A subclass defines D."""

    def update_diagonal(self, bucket: Bucket) -> Tensors:
        """Update D with the gradients and return it, parallel to the parameters."""
        raise NotImplementedError

    @override
    def direction_and_squared_norm(self, bucket: Bucket) -> tuple[Tensors, Tensor]:
        b = torch._foreach_abs(self.update_diagonal(bucket))
        torch._foreach_clamp_min_(b, bucket["alpha"])
        direction = torch._foreach_div(bucket.g, b)
        return direction, inner_product(bucket.g, direction)


class AdamPolyakRule(PreconditionedPolyakRule):
    """D = √v̂."""

    buffers = ("second_moment",)

    @override
    def update_diagonal(self, bucket: Bucket) -> Tensors:
        average_square_(bucket.state("second_moment"), bucket.g, bucket["beta"])
        # No ε is needed, since α bounds B.
        return root(bucket.state("second_moment"), 1 - bucket["beta"] ** bucket.t, 0.0)


class AdaGradPolyakRule(PreconditionedPolyakRule):
    """D = √Σ g²."""

    buffers = ("sum_of_squares",)

    @override
    def update_diagonal(self, bucket: Bucket) -> Tensors:
        total = bucket.state("sum_of_squares")
        torch._foreach_addcmul_(total, bucket.g, bucket.g)
        return torch._foreach_sqrt(total)


class HutchinsonPolyakRule(PreconditionedPolyakRule):
    """D ← β D + (1 - β) z ⊙ H z."""

    buffers = ("diagonal",)
    estimates: dict[Tensor, Tensor]
    """z ⊙ H z by parameter; set them before each step."""

    @override
    def update_diagonal(self, bucket: Bucket) -> Tensors:
        diagonal = bucket.state("diagonal")
        estimates = [self.estimates[p].to(g.dtype) for p, g in zip(bucket.parameters, bucket.g, strict=True)]
        # A weight of 0 for the initial zeros: D starts at the first estimate.
        average_(diagonal, estimates, bucket["beta"] if bucket.t > 1 else 0.0)
        return diagonal
