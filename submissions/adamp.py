"""AdamP and SGDP: Heo et al. 2020, "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights", arXiv:2006.08217, Algorithms 1 and 2. Momentum lengthens scale-invariant weights, on whose length the loss
does not depend. So the radial component of their direction p is removed:

    if |cos(θ, g)| < δ / √dim:    p ← p - (θ̂ · p) θ̂,  λ ← wd_ratio λ          θ̂ = θ / ‖θ‖
    θ ← θ - η (p + λ θ)

The condition is tried for the output channels (all of them must pass), else for the whole tensor, and only for tensors
of at least two dimensions. p is the direction of Adam, or of SGD with momentum; for SGD, λ is divided by 1 - momentum
as in the authors' code. State: that of Adam or SGD. Defaults (paper and code): δ = 0.1, wd_ratio = 0.1; for AdamP also
Adam's.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class _ProjectedRule(Rule):
    """A rule whose direction p is projected as in the module docstring."""

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        directions, decay_factors = list(direction), [1.0] * len(direction)
        matrices = [k for k, theta in enumerate(bucket.theta) if theta.ndim > 1 and theta.numel()]
        if matrices:
            # One transfer to the host for all matrices together.
            invariances = torch.stack(
                [_is_scale_invariant(bucket.theta[k], bucket.g[k], bucket["delta"]) for k in matrices]
            ).tolist()
            for k, (per_channel, per_tensor) in zip(matrices, invariances, strict=True):
                if per_channel or per_tensor:
                    rows = len(bucket.theta[k]) if per_channel else 1
                    directions[k] = _remove_radial_component(bucket.theta[k], directions[k], rows)
                    decay_factors[k] = bucket["wd_ratio"]
        if bucket["weight_decay"]:
            rate = bucket["lr"] * bucket["weight_decay"] / (1 - bucket.group.get("momentum", 0.0))
            torch._foreach_mul_(bucket.theta, [1 - rate * factor for factor in decay_factors])
        torch._foreach_add_(bucket.theta, directions, alpha=-bucket["lr"])


def _is_scale_invariant(theta: Tensor, g: Tensor, delta: float) -> Tensor:
    """Whether |cos(θ, g)| is below its bound for every output channel, and for the whole tensor: bool [2]."""
    w, u = theta.flatten(1), g.flatten(1)
    products, w_squared, u_squared = (torch.linalg.vecdot(a, b) for a, b in ((w, u), (w, w), (u, u)))
    # The bound avoids a division by zero where weights or gradients are zero.
    channel_cosines = products.abs() / (w_squared * u_squared).sqrt().clamp(min=1e-8)
    cosine = products.sum().abs() / (w_squared.sum() * u_squared.sum()).sqrt().clamp(min=1e-8)
    return torch.stack([channel_cosines.max() < delta / w.shape[1] ** 0.5, cosine < delta / w.numel() ** 0.5])


def _remove_radial_component(theta: Tensor, p: Tensor, rows: int) -> Tensor:
    """p - (θ̂ · p) θ̂, where θ̂ and p are cut into `rows` vectors, each projected by itself."""
    w = theta.reshape(rows, -1)
    unit = w / (w.norm(dim=1, keepdim=True) + 1e-8)
    vectors = p.reshape(rows, -1)
    return (vectors - unit * (unit * vectors).sum(1, keepdim=True)).reshape(theta.shape)


class AdamP(_ProjectedRule):
    """AdamP: p is Adam's direction.

    delta: δ, the bound of the cosine. wd_ratio: factor on weight decay where p is projected.
    """

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


class SGDP(_ProjectedRule):
    """SGDP: p is the direction of SGD with (Nesterov) momentum; hyperparameters as of `AdamP`."""

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
