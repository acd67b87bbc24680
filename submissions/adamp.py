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
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class _Projecting(Rule):
    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        moves, factors = list(direction), [1.0] * len(direction)
        matrices = [k for k, theta in enumerate(bucket.theta) if theta.ndim > 1 and theta.numel()]
        if matrices:
            found = torch.stack([_invariant(bucket.theta[k], bucket.g[k], bucket["delta"]) for k in matrices]).tolist()
            for k, (by_channel, as_a_whole) in zip(matrices, found, strict=True):
                if by_channel or as_a_whole:
                    moves[k] = _tangential(bucket.theta[k], moves[k], len(bucket.theta[k]) if by_channel else 1)
                    factors[k] = bucket["wd_ratio"]
        if bucket["weight_decay"]:
            rate = bucket["lr"] * bucket["weight_decay"] / (1 - bucket.group.get("momentum", 0.0))
            torch._foreach_mul_(bucket.theta, [1 - rate * factor for factor in factors])
        torch._foreach_add_(bucket.theta, moves, alpha=-bucket["lr"])


def _invariant(theta: Tensor, g: Tensor, delta: float) -> Tensor:
    """Whether the loss does not depend on the length of any channel, and of the whole tensor: two booleans."""
    w, u = theta.flatten(1), g.flatten(1)
    dots, lengths, slopes = (torch.linalg.vecdot(a, b) for a, b in ((w, u), (w, w), (u, u)))
    channels = dots.abs() / (lengths * slopes).sqrt().clamp(min=1e-8)
    whole = dots.sum().abs() / (lengths.sum() * slopes.sum()).sqrt().clamp(min=1e-8)
    return torch.stack([channels.max() < delta / w.shape[1] ** 0.5, whole < delta / w.numel() ** 0.5])


def _tangential(theta: Tensor, p: Tensor, rows: int) -> Tensor:
    """p without its component along theta, of which each of `rows` pieces has its own."""
    w = theta.reshape(rows, -1)
    radius = w / (w.norm(dim=1, keepdim=True) + 1e-8)
    pieces = p.reshape(rows, -1)
    return (pieces - radius * (radius * pieces).sum(1, keepdim=True)).reshape(theta.shape)


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

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return adam(bucket)


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

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        velocity = bucket.state("velocity")
        torch._foreach_mul_(velocity, bucket["momentum"])
        torch._foreach_add_(velocity, bucket.g)
        return torch._foreach_add(bucket.g, velocity, alpha=bucket["momentum"]) if bucket["nesterov"] else velocity
