"""AdamP and SGDP: Heo et al. 2020, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights", arXiv:2006.08217, Algorithms 1 and 2. Where the loss does not depend on the length of the weights, momentum
only inflates it; so the radial part of the direction p is dropped there:

    if |cos(θ, g)| < δ / √dim:    p ← p - (θ̂ · p) θ̂,  λ ← wd_ratio λ          θ̂ = θ / ‖θ‖
    θ ← θ - η (p + λ θ)

tried per output channel (all channels must pass), else for the whole tensor; tensors of at least two dimensions only.
p is Adam's direction, or SGD's with momentum, for which λ is divided by 1 - momentum, as in the authors' code.
State as Adam's and SGD's. Defaults (paper and code): δ = 0.1, wd_ratio = 0.1; AdamP with Adam's.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT

from submissions.rule import Rule, Slice, Tensors, adam


def project(theta: Tensor, g: Tensor, direction: Tensor, delta: float, wd_ratio: float) -> tuple[Tensor, Tensor]:
    """The direction without its radial part where `theta` is scale-invariant, and the factor on weight decay."""
    one = theta.new_ones(())
    if theta.ndim < 2 or theta.numel() == 0:
        return direction, one
    result, factor = direction, one
    for rows in (1, len(theta)):  # the test by channel, which comes last, wins
        w, u, p = (tensor.reshape(rows, -1) for tensor in (theta, g, direction))
        cosine = torch.cosine_similarity(w, u, dim=1, eps=1e-8).abs().max()
        radius = w / (w.norm(dim=1, keepdim=True) + 1e-8)
        tangential = (p - radius * (radius * p).sum(1, keepdim=True)).reshape(theta.shape)
        invariant = cosine < delta / w.shape[1] ** 0.5
        result = torch.where(invariant, tangential, result)
        factor = torch.where(invariant, wd_ratio, factor)
    return result, factor


class _Projecting(Rule):
    def apply(self, at: Slice, direction: Tensors) -> None:
        projected = [
            project(theta, g, p, at["delta"], at["wd_ratio"])
            for theta, g, p in zip(at.theta, at.g, direction, strict=True)
        ]
        if at["weight_decay"]:
            rate = at["lr"] * at["weight_decay"] / (1 - at.group.get("momentum", 0.0))
            torch._foreach_mul_(at.theta, [1 - rate * factor for _, factor in projected])
        torch._foreach_add_(at.theta, [p for p, _ in projected], alpha=-at["lr"])


class AdamP(_Projecting):
    buffers = ("momentum", "second_moment")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: NonNegativeFloat = 0.1,
        wd_ratio: NonNegativeFloat = 0.1,
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters | {"delta": delta, "wd_ratio": wd_ratio})

    def direction(self, at: Slice) -> Tensors:
        return adam(at)


class SGDP(_Projecting):
    buffers = ("velocity",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        delta: NonNegativeFloat = 0.1,
        wd_ratio: NonNegativeFloat = 0.1,
    ) -> None:
        hyperparameters = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters | {"delta": delta, "wd_ratio": wd_ratio})

    def direction(self, at: Slice) -> Tensors:
        velocity = at.state("velocity")
        torch._foreach_mul_(velocity, at["momentum"])
        torch._foreach_add_(velocity, at.g)
        return torch._foreach_add(at.g, velocity, alpha=at["momentum"]) if at["nesterov"] else velocity
