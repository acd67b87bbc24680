"""XGrad: Guan, Li, Shi & Liu 2023, "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction",
arXiv:2305.18240, Algorithm 1. A wrapper around any submission; the gradient is computed at predicted weights, s steps
ahead, and applied to the present weights:

    θ̂ = θ_t - s η Δ_{t-1},   θ_{t+1} = the submission's step from θ_t with the gradient at θ̂

η Δ_{t-1} = θ_{t-1} - θ_t is the last step. With a constant learning rate and no weight decay this is the paper's Δ: the
momentum of SGD, or m̂ / (√v̂ + ε) of Adam's family, after the last step. With decoupled weight decay the prediction
includes the decay. The first step predicts no change. The trained weights θ are evaluated; BatchNorm statistics are
those at θ̂; other losses and Hessian-vector products of the submission are at θ. One state tensor per parameter. Default
(paper): s = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup, StepContext, Submission, WrappedContext, Wrapper, swapped


class XGrad(Wrapper):
    """XGrad as in the module docstring. xgrad_steps: s."""

    def __init__(self, setup: Setup, inner: Submission, *, xgrad_steps: PositiveFloat = 1.0) -> None:
        super().__init__(setup, inner)
        self.steps = xgrad_steps
        self.last = [p.detach().clone() for p in setup.parameters]

    @override
    def step(self, ctx: StepContext) -> None:
        weights = [p.detach() for p in self.setup.parameters]
        # θ_{t-1} + (1 + s) (θ_t - θ_{t-1}).
        predicted = torch._foreach_lerp(self.last, weights, 1 + self.steps)
        # Before the inner step, which changes the weights in place.
        torch._foreach_copy_(self.last, weights)
        context: Any = _PredictedContext(ctx, list(predicted))
        self.inner.step(context)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self.last}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last = state["last"]


class _PredictedContext(WrappedContext):
    """A step context whose gradients are computed at the predicted weights θ̂, a list parallel to the parameters."""

    def __init__(self, ctx: StepContext, predicted: list[Tensor]) -> None:
        super().__init__(ctx)
        self.predicted = predicted

    @override
    def backward(self) -> Tensor:
        with swapped(self.ctx.parameters, self.predicted):
            return self.ctx.backward()

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """As `StepContext.micro_batch_gradients`, at θ̂."""
        with swapped(self.ctx.parameters, self.predicted):
            return self.ctx.micro_batch_gradients(at_least)
