"""ScheduleFree+: Defazio 2026, "ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to Large Language
Models", arXiv:2605.19095. Schedule-Free AdamW with momentum inside and a Polyak step in place of a learning rate. With
the loss f and gradient g at y:

    e ← β_p e + (1 - β_p) ‖g‖₁ √(π/2)
    α = γ_t (f - f* + b ⟨g, z - x⟩)₊ / ê                     ê = e / (1 - β_p^t)
    m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
    z ← z - α² λ y - α m̂ / (√v̂ + ε)
    x ← (1 - c) x + c z,   y = b x + (1 - b) z               c = w / Σ w,   w = t^r max γ²

γ_t is lr times the schedule's factor: a warm-up, then constant. The norm, the inner product and α are over all
parameters. b grows linearly from b₀ to b₁ over a share of the budget. The paper's c = 1 during its warm-up is left out:
the factors of the warm-up are small. x is evaluated. State: m, v and z, three tensors per parameter. Defaults: lr 1, as
the paper has no learning rate; the others, for want of the paper's, are near Schedule-Free's: β = (0.9, 0.999),
β_p = 0.9, b from 0.9 to 0.99, r = 0, λ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import FiniteFloat, NonNegativeFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext, swapped
from submissions.rule import Bucket, Rule, Tensors, adam, inner_product, upcast


class ScheduleFreePlus(OptimizerSubmission):
    """ScheduleFree+ as in the module docstring.

    polyak_beta: β_p. mix: (b₀, b₁). mix_steps: the share of the budget over which b grows. averaging_power: r.
    lower_bound: f*.
    """

    needs = frozenset({Need.EVALUATION_WEIGHTS, Need.TOTAL_STEPS})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        polyak_beta: float = 0.9,
        mix: tuple[float, float] = (0.9, 0.99),
        mix_steps: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        averaging_power: NonNegativeFloat = 0.0,
        lower_bound: FiniteFloat = 0.0,
    ) -> None:
        if not all(0 < b <= 1 for b in mix):
            raise ValueError(f"mix={mix}: both weights of the average must be in (0, 1]; correct them")
        self.mix, self.mix_steps = mix, mix_steps * setup.total_steps
        hyperparameters: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "polyak_beta": polyak_beta,
            "mix": mix[0], "averaging_power": averaging_power, "lower_bound": lower_bound,
        }  # fmt: skip
        self.rule = ScheduleFreePlusRule(setup.decay_groups(), hyperparameters)
        super().__init__(setup, [self.rule])

    @override
    def step(self, ctx: StepContext) -> None:
        self.rule.loss = ctx.backward()
        self.clip_gradients()
        share = min(1.0, (ctx.step + 1) / self.mix_steps)
        self.rule.next_mix = self.mix[0] + share * (self.mix[1] - self.mix[0])
        self.update(ctx)
        # Nothing of this step is kept.
        self.rule.loss = 0.0

    @override
    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with swapped(self.setup.parameters, self.rule.averages(self.setup.parameters)):
            yield


class ScheduleFreePlusRule(Rule):
    """The update of the module docstring. The parameters hold y; x is computed from y and z."""

    buffers = ("momentum", "second_moment")
    loss: Tensor | float = 0.0
    """f of the step."""
    next_mix: float = 0.9
    """b of the y that the step makes."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, hyperparameters | {"steps": 0, "weight_sum": 0.0, "largest_lr": 0.0})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"fast": theta.clone()}

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            group["largest_lr"] = max(group["largest_lr"], group["lr"])
            group["weight_sum"] += group["steps"] ** group["averaging_power"] * group["largest_lr"] ** 2
        if not buckets:
            return
        first = buckets[0]
        zero = first.theta[0].new_zeros(())
        norm, ahead = zero, zero
        for bucket in buckets:
            norm = norm + torch.stack(torch._foreach_norm(bucket.g, 1)).sum()
            # z - x = (z - y) / b.
            ahead = ahead + inner_product(bucket.g, torch._foreach_sub(bucket.state("fast"), bucket.theta))
        beta, t = first["polyak_beta"], first["steps"]
        average = self.shared("gradient_norm", lambda: zero.clone())
        average.lerp_(norm * math.sqrt(math.pi / 2), 1 - beta)
        # b ⟨g, z - x⟩ = ⟨g, z - y⟩.
        gap = (self.loss - first["lower_bound"] + ahead).clamp_min(0)
        polyak = gap / (average / (1 - beta**t)).clamp_min(1e-30)
        for bucket in buckets:
            bucket.scratch["polyak"] = polyak

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return adam(bucket)

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        z, y, b = bucket.state("fast"), bucket.theta, bucket["mix"]
        alpha = bucket["lr"] * bucket.scratch["polyak"]
        weight = bucket["steps"] ** bucket["averaging_power"] * bucket["largest_lr"] ** 2
        # All factors so far may be zero.
        c = weight / bucket["weight_sum"] if bucket["weight_sum"] else 0.0
        x = torch._foreach_lerp(y, z, 1 - 1 / b)
        torch._foreach_sub_(z, torch._foreach_mul(direction, alpha))
        if bucket["weight_decay"]:
            torch._foreach_sub_(z, torch._foreach_mul(y, alpha.square() * bucket["weight_decay"]))
        torch._foreach_lerp_(x, z, c)
        torch._foreach_copy_(y, torch._foreach_lerp(z, x, self.next_mix))

    @override
    def finish_step(self, buckets: Sequence[Bucket]) -> None:
        for group in self.param_groups:
            group["mix"] = self.next_mix

    def averages(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """x of each parameter; of one without state, its value."""
        mixes = {p: group["mix"] for group in self.param_groups for p in group["params"]}
        return [
            upcast(p.detach()).lerp(self.state[p]["fast"], 1 - 1 / mixes[p]) if p in self.state else p.detach()
            for p in parameters
        ]
