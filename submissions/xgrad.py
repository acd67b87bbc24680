"""XGrad: Guan, Li, Shi & Liu 2023, "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction",
arXiv:2305.18240, Algorithm 1. Around any submission: the gradient is taken where the weights are expected to be s
steps ahead, and applied to the weights as they are:

    θ̂ = θ_t - s η Δ_{t-1},   θ_{t+1} = the submission's step from θ_t with the gradient at θ̂

η Δ_{t-1} is how the last step moved the weights, θ_{t-1} - θ_t. With a constant learning rate and no weight decay that
is the paper's: the momentum of SGD, m̂ / (√v̂ + ε) of Adam's family, each as the last step left it; with decoupled
weight decay the prediction decays too. The first step predicts nothing. The trained weights θ are evaluated, BatchNorm
statistics are those at θ̂; other losses and Hessian-vector products that the submission asks for are at θ. One state
tensor per parameter. Default (paper): s = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup, StepContext, Submission, WrappedContext, Wrapper, swapped


class XGrad(Wrapper):
    def __init__(self, setup: Setup, inner: Submission, *, xgrad_steps: PositiveFloat = 1.0) -> None:
        super().__init__(setup, inner)
        self.steps = xgrad_steps
        self.last = [p.detach().clone() for p in setup.parameters]

    @override
    def step(self, ctx: StepContext) -> None:
        here = [p.detach() for p in self.setup.parameters]
        ahead = torch._foreach_lerp(self.last, here, 1 + self.steps)
        torch._foreach_copy_(self.last, here)
        context: Any = _Ahead(ctx, list(ahead))
        self.inner.step(context)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self.last}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last = state["last"]


class _Ahead(WrappedContext):
    def __init__(self, ctx: StepContext, weights: list[Tensor]) -> None:
        super().__init__(ctx)
        self.weights = weights

    @override
    def backward(self) -> Tensor:
        with swapped(self.ctx.parameters, self.weights):
            return self.ctx.backward()

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        with swapped(self.ctx.parameters, self.weights):
            return self.ctx.micro_batch_gradients(at_least)
