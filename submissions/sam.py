"""SAM (sharpness-aware minimisation): Foret et al. 2020, arXiv:2010.01412, Algorithm 1. A wrapper around any
submission; the gradient is that at perturbed weights, a step of length ρ uphill:

    ĝ = ∇f(θ + ρ g / ‖g‖),   g = ∇f(θ)

Both gradients use the same batch with the same dropout masks, so a step costs two. No state. Default (paper): ρ = 0.05.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, WrappedContext, Wrapper, swapped


class SAM(Wrapper):
    """Sharpness-aware minimisation. sam_rho: ρ."""

    needs = frozenset({Need.RE_EVALUATE})

    def __init__(self, setup: Setup, inner: Submission, *, sam_rho: PositiveFloat = 0.05) -> None:
        super().__init__(setup, inner)
        self.rho = sam_rho

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(cast(StepContext, _PerturbedContext(ctx, self.rho)))


class _PerturbedContext(WrappedContext):
    """A step context whose gradient is ĝ of the module docstring."""

    def __init__(self, ctx: StepContext, rho: float) -> None:
        super().__init__(ctx)
        self.rho = rho

    @override
    def backward(self) -> Tensor:
        """Put ĝ into ``.grad`` and return the loss at θ, a scalar without a graph."""
        loss, gradients = self.ctx.loss_and_gradients()
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        weights = [p.detach() for p in self.ctx.parameters]
        perturbations = torch._foreach_mul(gradients, self.rho / (norm + 1e-12))
        # `swapped` restores θ to the bit, which a subtraction of the perturbation would not.
        with swapped(self.ctx.parameters, torch._foreach_add(weights, perturbations)):
            self.ctx.backward()
        return loss
