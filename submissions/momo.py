"""MoMo and MoMo-Adam: Schaipp et al. 2023, "MoMo: Momentum Models for Adaptive Learning Rates", arXiv:2305.07583,
Algorithms 1 and 2. Momentum whose step size is the smaller of η and a Polyak step on the average of past linear models
of the loss f, bounded below by f*. With the metric D (1, or Adam's √v̂ + ε) and ρ the bias correction of an average:

    d ← β d + (1 - β) g
    f̄ ← β f̄ + (1 - β) f
    γ ← β γ + (1 - β) ⟨g, θ⟩
    τ = min(η / ρ, ((1 + ηλ) (f̄ - ρ f* - γ) + ⟨d, θ⟩)₊ / ⟨d, D⁻¹ d⟩)
    θ ← (θ - τ D⁻¹ d) / (1 + η λ)

MoMo starts its averages at the first values (ρ = 1), MoMo-Adam at zero. Inner products go over all parameters.
State tensors per parameter: d, and v for MoMo-Adam. Defaults (paper and package): f* = 0; MoMo lr 1, β = 0.9;
MoMo-Adam lr 1e-2, β = (0.9, 0.999), ε = 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import FiniteFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT

from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup
from submissions.rule import Rule, Slice, Tensors, average_, average_square_, root


class MoMo(OptimizerSubmission):
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

    def step(self, ctx: StepContext) -> None:
        loss = ctx.backward()
        self.clip_gradients()
        for optimizer in self.optimizers:
            assert isinstance(optimizer, MoMoRule)
            optimizer.loss = float(loss)
        self.update(ctx)


class MoMoAdam(MoMo):
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
        OptimizerSubmission.__init__(self, setup, [rule])


class MoMoRule(Rule):
    """`loss` is to be set before each step."""

    averages_start_at_zero: ClassVar[bool] = False

    def __init__(self, params: ParamsT, lr: float, beta: float, weight_decay: float, lower_bound: float) -> None:
        hyperparameters = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "lower_bound": lower_bound}
        super().__init__(params, hyperparameters | {"mean_loss": 0.0, "mean_product": 0.0, "updates": 0})
        self.loss = 0.0

    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": g.clone()}

    def metric(self, at: Slice) -> Tensors | None:
        return None

    def survey(self, slices: Sequence[Slice]) -> None:
        """The step size of every group, from inner products over all parameters."""
        if not slices:
            return
        first = self.param_groups[0]
        beta, updates = first["beta"], first["updates"] + 1
        products: list[Tensor] = []
        for at in slices:
            d = at.state("momentum")
            average_(d, at.g, beta)
            metric = self.metric(at)
            step = d if metric is None else torch._foreach_div(d, metric)
            at.notes["step"] = step
            products += [
                torch.stack([(g * theta).sum(), (m * theta).sum(), (m * s).sum()])
                for g, theta, m, s in zip(at.g, at.theta, d, step, strict=True)
            ]
        gradient_product, momentum_product, length = torch.stack(products).sum(0).tolist()
        rho = 1 - beta**updates if self.averages_start_at_zero else 1.0
        kept = beta if updates > 1 or self.averages_start_at_zero else 0.0
        loss = kept * first["mean_loss"] + (1 - kept) * self.loss
        product = kept * first["mean_product"] + (1 - kept) * gradient_product
        for group in self.param_groups:
            decay = 1 + group["lr"] * group["weight_decay"]
            gap = decay * (loss - rho * group["lower_bound"] - product) + momentum_product
            polyak = max(gap, 0.0) / length if length > 0 else 0.0
            group |= {"mean_loss": loss, "mean_product": product, "updates": updates}
            group["step_size"] = min(group["lr"] / rho, polyak)

    def direction(self, at: Slice) -> Tensors:
        step: Tensors = at.notes["step"]
        return step

    def apply(self, at: Slice, direction: Tensors) -> None:
        torch._foreach_add_(at.theta, direction, alpha=-at["step_size"])
        torch._foreach_div_(at.theta, 1 + at["lr"] * at["weight_decay"])


class MoMoAdamRule(MoMoRule):
    buffers = ("momentum", "second_moment")
    averages_start_at_zero = True

    def __init__(
        self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        lower_bound: float,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas[0], weight_decay, lower_bound)
        for group in self.param_groups:
            group |= {"beta2": betas[1], "eps": eps}

    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return Rule.initial_state(self, theta, g, group)

    def metric(self, at: Slice) -> Tensors:
        average_square_(at.state("second_moment"), at.g, at["beta2"])
        return root(at.state("second_moment"), 1 - at["beta2"] ** at.t, at["eps"])
