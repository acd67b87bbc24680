"""Nesterov's momentum on the path of the weights, around any submission.

EMANesterov: Yau et al. 2026, "EMA-Nesterov", arXiv:2605.25395. Each step of the wrapped submission, A, starts ahead, by
an average m of the moves so far:

    θ⁺ = A(θ + β_t m),   m ← γ m + (1 - γ) (θ⁺ - θ),   θ ← θ⁺
    β_t = β times the schedule's factor between two shares of the budget, 0 outside of them

OuterNesterov: SNOO, Kallusky et al. 2025, arXiv:2510.15830, and MuLoCo with one worker, Thérien et al. 2025,
arXiv:2505.23725. Every K steps of the wrapped submission, from the slow weights φ to θ, are one outer step:

    s = φ - θ,   b ← μ b + s,   φ ← φ - η (μ b + s),   θ ← φ

μ = 0 is Lookahead. Evaluated are the weights θ, as they are. State tensors per parameter: m; φ and b. Defaults: modded-
nanogpt track 3, results 39 and 13 (γ = 0.99, β = 0.6 from 0.16 to 0.76 of the budget; K = 30, η = 0.7, μ = 0.5).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, Wrapper

Share = Annotated[float, Interval(ge=0, le=1)]


class EMANesterov(Wrapper):
    """EMA-Nesterov. ahead: β. ahead_ema: γ. ahead_start, ahead_end: the shares of the budget between which it acts."""

    needs = frozenset({Need.TOTAL_STEPS})

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        ahead: NonNegativeFloat = 0.6,
        ahead_ema: Annotated[float, Interval(ge=0, lt=1)] = 0.99,
        ahead_start: Share = 0.16,
        ahead_end: Share = 0.76,
    ) -> None:
        super().__init__(setup, inner)
        self.ahead, self.decay = ahead, ahead_ema
        self.start, self.end = ahead_start * setup.total_steps, ahead_end * setup.total_steps
        self.average = [torch.zeros_like(p) for p in self._weights()]

    @override
    def step(self, ctx: StepContext) -> None:
        weights = self._weights()
        before = [weight.clone() for weight in weights]
        if self.start <= ctx.step < self.end:
            torch._foreach_add_(weights, self.average, alpha=self.ahead * self.setup.learning_rate_factor(ctx.step))
        super().step(ctx)
        torch._foreach_lerp_(self.average, torch._foreach_sub(weights, before), 1 - self.decay)

    def _weights(self) -> list[Tensor]:
        """Aliases of the parameters, outside of autograd."""
        return [p.detach() for p in self.setup.parameters]

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average = state["average"]


class OuterNesterov(Wrapper):
    """SNOO. outer_lr: η. outer_momentum: μ. outer_every: K."""

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        outer_lr: PositiveFloat = 0.7,
        outer_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
        outer_every: PositiveInt = 30,
    ) -> None:
        super().__init__(setup, inner)
        self.lr, self.momentum, self.every, self.count = outer_lr, outer_momentum, outer_every, 0
        self.slow = [p.detach().clone() for p in setup.parameters]
        self.buffer = [torch.zeros_like(weight) for weight in self.slow]

    @override
    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self.count += 1
        if self.count % self.every == 0:
            weights = [p.detach() for p in self.setup.parameters]
            moved = torch._foreach_sub(self.slow, weights)
            torch._foreach_mul_(self.buffer, self.momentum)
            torch._foreach_add_(self.buffer, moved)
            torch._foreach_add_(moved, self.buffer, alpha=self.momentum)
            torch._foreach_add_(self.slow, moved, alpha=-self.lr)
            torch._foreach_copy_(weights, self.slow)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"slow": self.slow, "buffer": self.buffer, "count": self.count}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.slow, self.buffer, self.count = state["slow"], state["buffer"], state["count"]
