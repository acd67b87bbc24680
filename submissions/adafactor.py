"""Adafactor: Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235,
Algorithms 4 to 6. The second moment is factored into rows and columns; steps are clipped and relative to the weights;
there is no momentum:

    β = 1 - t^c                                    c = -0.8
    R ← β R + (1 - β) mean over columns of (g² + ε₁)
    C ← β C + (1 - β) mean over rows of (g² + ε₁)
    V = R Cᵀ / mean(R)                             vectors: V ← β V + (1 - β) (g² + ε₁)
    u = g / √V,   u ← u / max(1, RMS(u) / d)
    θ ← θ - ρ max(ε₂, RMS(θ)) u - ρ λ θ            ρ = min(η, 1 / √t)

Convolutions count as matrices [out, in · h · w]. State per matrix of n by m: n + m numbers. Defaults (paper):
ρ = min(0.01, 1 / √t), ε = (1e-30, 1e-3), d = 1, c = -0.8. torch.optim.Adafactor agrees, but fails on empty parameters.
The paper has no weight decay; here it is decoupled.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class Adafactor(Rule):
    """Adafactor: the update of the module docstring.

    lr: η, the cap of ρ. beta2_exponent: c. eps: (ε₁, ε₂). clip_rms: d.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        beta2_exponent: Annotated[float, Interval(ge=-1, lt=0)] = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_rms: PositiveFloat = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        hyperparameters = {"lr": lr, "beta2_exponent": beta2_exponent, "eps": eps, "clip_rms": clip_rms}
        super().__init__(params, hyperparameters | {"weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if theta.ndim < 2 or theta.numel() == 0:
            return {"second_moment": torch.zeros_like(theta)}
        rows, columns = theta.flatten(1).shape
        return {"rows": theta.new_zeros(rows, 1), "columns": theta.new_zeros(1, columns)}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta, (eps1, eps2) = 1 - bucket.t ** bucket["beta2_exponent"], bucket["eps"]
        squares = torch._foreach_mul(bucket.g, bucket.g)
        torch._foreach_add_(squares, eps1)
        scales = []
        for g, square, state in zip(bucket.g, squares, bucket.states, strict=True):
            if "rows" in state:
                square = square.flatten(1)
                state["rows"].lerp_(square.mean(1, keepdim=True), 1 - beta)
                state["columns"].lerp_(square.mean(0, keepdim=True), 1 - beta)
                # Two separate roots, because the product of two small numbers may underflow to zero.
                scale = (state["rows"] / state["rows"].mean()).rsqrt() * state["columns"].rsqrt()
                scales.append(scale.reshape(g.shape))
            else:
                scales.append(state["second_moment"].lerp_(square, 1 - beta).rsqrt())
        u = torch._foreach_mul(bucket.g, scales)
        divisors = _rms(u)
        torch._foreach_div_(divisors, bucket["clip_rms"])
        torch._foreach_clamp_min_(divisors, 1.0)
        u = torch._foreach_div(u, divisors)
        factors = _rms(bucket.theta)
        torch._foreach_clamp_min_(factors, eps2)
        return torch._foreach_mul(u, factors)

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # ρ; the factor max(ε₂, RMS(θ)) is in the direction, so that it does not scale the decay.
        rate = min(bucket["lr"], bucket.t**-0.5)
        if bucket["weight_decay"]:
            torch._foreach_mul_(bucket.theta, 1 - rate * bucket["weight_decay"])
        torch._foreach_add_(bucket.theta, direction, alpha=-rate)


def _rms(tensors: Tensors) -> Tensors:
    """Root mean square of all elements of each tensor, scalars; 0 for an empty tensor."""
    norms = torch._foreach_norm(tensors)
    torch._foreach_div_(norms, [max(tensor.numel(), 1) ** 0.5 for tensor in tensors])
    return norms
