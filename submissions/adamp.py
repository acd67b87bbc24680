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
        directions, matrices, others = list(direction), [], []
        rate = bucket["lr"] * bucket["weight_decay"] / (1 - bucket.group.get("momentum", 0.0))
        for k, theta in enumerate(bucket.theta):
            if theta.ndim < 2 or not theta.numel():
                others.append(theta)
                continue
            directions[k], is_projected = _project(theta, bucket.g[k], direction[k], bucket["delta"])
            # new_full and not a number, which `where` would take for float32.
            projected_factor = theta.new_full((), 1 - rate * bucket["wd_ratio"])
            # Decided on the device: nothing waits for it.
            matrices.append((theta, torch.where(is_projected, projected_factor, 1 - rate)))
        if bucket["weight_decay"]:
            if others:
                torch._foreach_mul_(others, 1 - rate)
            for theta, factor in matrices:
                theta.mul_(factor)
        torch._foreach_add_(bucket.theta, directions, alpha=-bucket["lr"])


def _project(theta: Tensor, g: Tensor, p: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """p - (θ̂ · p) θ̂ if θ is taken for scale-invariant, else p; and whether it is, a bool scalar.

    For every output channel by itself if |cos(θ, g)| is below its bound in all of them; otherwise for the whole tensor
    if it is below the bound there.
    """
    w, u, v = theta.flatten(1), g.flatten(1), p.flatten(1)
    w_u, w_w, u_u, w_v = (torch.linalg.vecdot(a, b) for a, b in ((w, u), (w, w), (u, u), (w, v)))
    # The bound avoids a division by zero where weights or gradients are zero.
    channel_cosines = w_u.abs() / (w_w * u_u).sqrt().clamp(min=1e-8)
    cosine = w_u.sum().abs() / (w_w.sum() * u_u.sum()).sqrt().clamp(min=1e-8)
    per_channel, per_tensor = channel_cosines.max() < delta / w.shape[1] ** 0.5, cosine < delta / w.numel() ** 0.5
    # (θ̂ · p) θ̂ = share θ, with one share for each channel or one for all.
    share_of_channel = w_v / (w_w.sqrt() + 1e-8).square()
    share_of_tensor = w_v.sum() / (w_w.sum().sqrt() + 1e-8).square()
    share = torch.where(per_channel, share_of_channel, torch.where(per_tensor, share_of_tensor, 0.0))
    return torch.addcmul(v, w, share[:, None], value=-1).view(theta.shape), per_channel | per_tensor


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
