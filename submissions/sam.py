"""SAM (sharpness-aware minimisation): Foret et al. 2020, arXiv:2010.01412, Algorithm 1. Around any submission, which
gets the gradient at a nearby worse point instead of its own:

    ĝ = ∇f(θ + ρ g / ‖g‖),   g = ∇f(θ)

on one batch with the same dropout, so a step costs two gradients. No state. Default (paper): ρ = 0.05.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, WrappedContext, Wrapper, swapped


class SAM(Wrapper):
    needs = frozenset({Need.RE_EVALUATE})

    def __init__(self, setup: Setup, inner: Submission, *, sam_rho: PositiveFloat = 0.05) -> None:
        super().__init__(setup, inner)
        self.rho = sam_rho

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(cast(StepContext, _Ascended(ctx, self.rho)))


class _Ascended(WrappedContext):
    def __init__(self, ctx: StepContext, rho: float) -> None:
        super().__init__(ctx)
        self.rho = rho

    @override
    def backward(self) -> Tensor:
        """The loss at θ, and the gradient at the worse point."""
        loss, gradients = self.ctx.loss_and_gradients()
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        here = [p.detach() for p in self.ctx.parameters]
        steps = torch._foreach_mul(gradients, self.rho / (norm + 1e-12))
        with swapped(self.ctx.parameters, torch._foreach_add(here, steps)):
            self.ctx.backward()
        return loss
