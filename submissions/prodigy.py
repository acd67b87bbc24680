"""Prodigy: Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
Algorithm 4. Adam whose step size d grows to an estimate of the distance from the start θ₀ to the solution, over all
parameters together:

    m ← β1 m + (1 - β1) d g
    v ← β2 v + (1 - β2) d² g²
    r ← √β2 r + η d² ⟨g, θ₀ - θ⟩
    s ← √β2 s + η d² g
    θ ← θ - η d (m / (√v + d ε) + λ θ)
    d ← max(d, c r / ‖s‖₁)

(The paper has a factor 1 - √β2 before both d², which cancels.) η is the schedule's factor, as lr is 1. Four state
tensors per parameter: m, v, s, θ₀. Defaults (paper and package): β = (0.9, 0.999), ε = 1e-8, initial d = 1e-6, c = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, add_scaled_, root


class Prodigy(Rule):
    """Prodigy: the update of the module docstring. initial_d: d at the first step. d_coefficient: c."""

    buffers = ("momentum", "second_moment", "gradient_sum")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        initial_d: PositiveFloat = 1e-6,
        d_coefficient: PositiveFloat = 1.0,
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "initial_d": initial_d}
        super().__init__(params, hyperparameters | {"d_coefficient": d_coefficient, "d": initial_d, "r": 0.0})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"start": theta.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        (beta1, beta2), lr, d = bucket["betas"], bucket["lr"], self._d(bucket)
        momentum, second_moment, s = (bucket.state(name) for name in self.buffers)
        # The factors d and d² are in the scalars, which saves a copy of the gradients.
        torch._foreach_mul_(momentum, beta1)
        add_scaled_(momentum, bucket.g, (1 - beta1) * d)
        torch._foreach_mul_(second_moment, beta2)
        if isinstance(d, Tensor):
            torch._foreach_addcmul_(second_moment, torch._foreach_mul(bucket.g, (1 - beta2) * d**2), bucket.g)
        else:
            torch._foreach_addcmul_(second_moment, bucket.g, bucket.g, value=(1 - beta2) * d**2)
        # Before θ moves.
        bucket.scratch["products"] = [
            lr * d**2 * torch.vdot(g.flatten(), (start - theta).flatten())
            for g, start, theta in zip(bucket.g, bucket.state("start"), bucket.theta, strict=True)
        ]
        torch._foreach_mul_(s, beta2**0.5)
        add_scaled_(s, bucket.g, lr * d**2)
        bucket.scratch["s_norms"] = torch._foreach_norm(s, 1)
        return torch._foreach_div(momentum, root(second_moment, 1.0, d * bucket["eps"]))

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        rate = bucket["lr"] * self._d(bucket)
        if bucket["weight_decay"]:
            torch._foreach_mul_(bucket.theta, 1 - rate * bucket["weight_decay"])
        add_scaled_(bucket.theta, direction, -rate)

    @override
    def finish_step(self, buckets: Sequence[Bucket]) -> None:
        """Compute r and the next d from what the buckets have left."""
        if not buckets:
            return
        shared = self.param_groups[0]
        products = torch.stack([product for bucket in buckets for product in bucket.scratch["products"]]).sum()
        s_norm = torch.stack([norm for bucket in buckets for norm in bucket.scratch["s_norms"]]).sum().double()
        d, r = (_double(shared[name], s_norm.device) for name in ("d", "r"))
        r = shared["betas"][1] ** 0.5 * r + products.double()
        candidate = shared["d_coefficient"] * r / s_norm
        # All gradients so far may be zero, or the learning rate: the candidate is then not a number, or infinite.
        d = torch.where((s_norm > 0) & (candidate > d), candidate, d)
        for group in self.param_groups:
            group |= {"d": d, "r": r} if d.device.type != "cpu" else {"d": float(d), "r": float(r)}

    def _d(self, bucket: Bucket) -> Any:
        """d, of which all groups hold the same: a number, or on a GPU a scalar there, so that nothing waits for it."""
        d = self.param_groups[0]["d"]
        return d.to(bucket.theta[0]) if isinstance(d, Tensor) else d


def _double(value: float | Tensor, device: torch.device) -> Tensor:
    """A scalar in float64 on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)
