"""MoMo and MoMo-Adam: Schaipp et al. 2023, "MoMo: Momentum Models for Adaptive Learning Rates", arXiv:2305.07583,
Algorithms 1 and 2. Momentum with the smaller of η and a Polyak step size; the latter uses the average of past linear
models of the loss f and its lower bound f*. With the metric D (1, or Adam's √v̂ + ε) and ρ the bias correction of an
average:

    d ← β d + (1 - β) g
    f̄ ← β f̄ + (1 - β) f
    γ ← β γ + (1 - β) ⟨g, θ⟩
    τ = min(η / ρ, ((1 + ηλ) (f̄ - ρ f* - γ) + ⟨d, θ⟩)₊ / ⟨d, D⁻¹ d⟩)
    θ ← (θ - τ D⁻¹ d) / (1 + η λ)

MoMo starts its averages at the first values (ρ = 1), MoMo-Adam at zero. Inner products are over all parameters. State
tensors per parameter: d, and v for MoMo-Adam. Defaults (paper and package): f* = 0; MoMo lr 1, β = 0.9; MoMo-Adam lr
1e-2, β = (0.9, 0.999), ε = 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import FiniteFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, root


class MoMo(OptimizerSubmission):
    """MoMo: the update of the module docstring with D = 1. lower_bound: f*."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        lower_bound: FiniteFloat = 0.0,
    ) -> None:
        super().__init__(setup, [MoMoRule(setup.decay_groups(), lr, beta, weight_decay, lower_bound)])

    @override
    def step(self, ctx: StepContext) -> None:
        loss = ctx.backward()
        self.clip_gradients()
        for optimizer in self.optimizers:
            cast(MoMoRule, optimizer).loss = loss
        self.update(ctx)
        # Nothing of this step is kept.
        for optimizer in self.optimizers:
            cast(MoMoRule, optimizer).loss = 0.0


class MoMoAdam(MoMo):
    """MoMo-Adam: the update of the module docstring with Adam's D. lower_bound: f*."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lower_bound: FiniteFloat = 0.0,
    ) -> None:
        rule = MoMoAdamRule(setup.decay_groups(), lr, betas, eps, weight_decay, lower_bound)
        # Not MoMo's constructor, which would build MoMo's rule.
        OptimizerSubmission.__init__(self, setup, [rule])


class MoMoRule(Rule):
    """MoMo's update. Set `loss`, the loss of the batch, before each step."""

    averages_start_at_zero: ClassVar[bool] = False
    """Whether d, f̄ and γ start at zero and are bias-corrected by ρ; if not, they start at their first values."""

    def __init__(self, params: ParamsT, lr: float, beta: float, weight_decay: float, lower_bound: float) -> None:
        hyperparameters = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "lower_bound": lower_bound}
        super().__init__(params, hyperparameters | {"updates": 0})
        self.loss: Tensor | float = 0.0

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": g.clone()}

    def metric(self, bucket: Bucket) -> Tensors | None:
        """Update and return D, parallel to the parameters; None stands for 1."""
        return None

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        """Compute the step size τ of every group from inner products over all parameters."""
        if not buckets:
            return
        # All groups hold the same averages.
        shared = self.param_groups[0]
        beta, updates = shared["beta"], shared["updates"] + 1
        products: list[Tensor] = []
        for bucket in buckets:
            d = bucket.state("momentum")
            average_(d, bucket.g, beta)
            metric = self.metric(bucket)
            step = d if metric is None else torch._foreach_div(d, metric)
            bucket.scratch["step"] = step
            products += [
                torch.stack([(g * theta).sum(), (m * theta).sum(), (m * s).sum()])
                for g, theta, m, s in zip(bucket.g, bucket.theta, d, step, strict=True)
            ]
        # ⟨g, θ⟩, ⟨d, θ⟩ and ⟨d, D⁻¹ d⟩, which stay on the device, as all that follows from them: nothing waits for it.
        gradient_product, momentum_product, squared_norm = torch.stack(products).sum(0).double().unbind()
        rho = 1 - beta**updates if self.averages_start_at_zero else 1.0
        old_weight = beta if updates > 1 or self.averages_start_at_zero else 0.0
        loss = self.shared("mean_loss", lambda: torch.zeros_like(squared_norm))
        loss.mul_(old_weight).add_((1 - old_weight) * torch.as_tensor(self.loss, dtype=torch.float64))
        product = self.shared("mean_product", lambda: torch.zeros_like(squared_norm))
        product.mul_(old_weight).add_((1 - old_weight) * gradient_product)
        for group in self.param_groups:
            group["updates"] = updates
        for bucket in buckets:
            decay = 1 + bucket["lr"] * bucket["weight_decay"]
            gap = decay * (loss - rho * bucket["lower_bound"] - product) + momentum_product
            polyak = torch.where(squared_norm > 0, gap.clamp_min(0) / squared_norm, 0.0)
            bucket.scratch["step_size"] = polyak.clamp_max(bucket["lr"] / rho).to(bucket.theta[0].dtype)

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        step: Tensors = bucket.scratch["step"]
        return step

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        torch._foreach_sub_(bucket.theta, torch._foreach_mul(direction, bucket.scratch["step_size"]))
        torch._foreach_div_(bucket.theta, 1 + bucket["lr"] * bucket["weight_decay"])


class MoMoAdamRule(MoMoRule):
    """MoMo-Adam's update. Set `loss`, the loss of the batch, before each step."""

    buffers = ("momentum", "second_moment")
    averages_start_at_zero = True

    def __init__(
        self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        lower_bound: float,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas[0], weight_decay, lower_bound)
        for group in self.param_groups:
            group |= {"beta2": betas[1], "eps": eps}

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        # Not MoMo's: d starts at zero.
        return Rule.initial_state(self, theta, g, group)

    @override
    def metric(self, bucket: Bucket) -> Tensors:
        average_square_(bucket.state("second_moment"), bucket.g, bucket["beta2"])
        return root(bucket.state("second_moment"), 1 - bucket["beta2"] ** bucket.t, bucket["eps"])
