"""Averages of the iterates that the gradient is taken near, around any submission. Its steps Δ, computed at y, move a
fast sequence z; x is the average of z, and is evaluated:

    z ← z + Δ,   x ← (1 - c) x + c z,   y = μ x + (1 - μ) z

PrimalAveraging: GPA, Defazio et al. 2025, "Smoothing DiLoCo with Primal Averaging", arXiv:2512.17131, with a fixed c;
like the average over K steps of DiLoCo with one worker, but at every step. c = 1 - μ_x in the paper's terms.

ScheduleFree: Defazio et al. 2024, arXiv:2405.15682, with c = η_max² / Σ η_max² over the steps so far, η_max the
largest factor of the schedule so far. Use a constant schedule with a warm-up. Around NorMuon it is SF-NorMuon, Apte et
al. 2026, arXiv:2605.23061.

The parameters hold y, and x is computed from y and z, so μ must be above 0. Weight decay of the wrapped submission acts
on y. State: z, one tensor per parameter. Defaults: GPA's code (μ = 0.7, c = 0.0033), Schedule-Free's paper (μ = 0.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, Wrapper, swapped
from submissions.rule import upcast


class PrimalAveraging(Wrapper):
    """GPA. gradient_mix: μ. averaging_rate: c."""

    needs = frozenset({Need.EVALUATION_WEIGHTS})

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        gradient_mix: Annotated[float, Interval(gt=0, le=1)] = 0.7,
        averaging_rate: Annotated[float, Interval(gt=0, le=1)] = 0.0033,
    ) -> None:
        super().__init__(setup, inner)
        self.mix, self.rate = gradient_mix, averaging_rate
        self.fast = [upcast(p.detach()).clone() for p in setup.parameters]

    def weight(self, step: float) -> float:
        """c of the step that is made after `step` nominal steps."""
        return self.rate

    @override
    def step(self, ctx: StepContext) -> None:
        y = [p.detach() for p in self.setup.parameters]
        before = [tensor.clone() for tensor in y]
        super().step(ctx)
        c = self.weight(ctx.step)
        moves = [upcast(new) - upcast(old) for new, old in zip(y, before, strict=True)]
        # The new y from the old y and z, without forming x: (1 - c) y + c z + (1 - μ (1 - c)) Δ.
        new = [upcast(old).lerp(z, c) for old, z in zip(before, self.fast, strict=True)]
        torch._foreach_add_(new, moves, alpha=1 - self.mix * (1 - c))
        torch._foreach_add_(self.fast, moves)
        torch._foreach_copy_(y, new)

    @override
    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        average = [upcast(p.detach()).lerp(z, 1 - 1 / self.mix) for p, z in self._pairs()]
        with super().evaluation_weights(), swapped(self.setup.parameters, average):
            yield

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.setup.parameters, self.fast, strict=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fast": self.fast}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fast = state["fast"]


class ScheduleFree(PrimalAveraging):
    """Schedule-Free around any submission. gradient_mix: μ, its β."""

    def __init__(
        self, setup: Setup, inner: Submission, *, gradient_mix: Annotated[float, Interval(gt=0, le=1)] = 0.9
    ) -> None:
        super().__init__(setup, inner, gradient_mix=gradient_mix)
        self.largest = self.total = 0.0

    @override
    def weight(self, step: float) -> float:
        self.largest = max(self.largest, self.setup.learning_rate_factor(step))
        self.total += self.largest**2
        # The factors so far may all be zero.
        return self.largest**2 / self.total if self.total else 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"largest": self.largest, "total": self.total}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.largest, self.total = state["largest"], state["total"]
