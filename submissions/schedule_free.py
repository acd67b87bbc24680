"""Schedule-Free SGD and AdamW: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682, Algorithm 1 for AdamW.
Gradients are computed at y, an interpolation of a fast sequence z and its average x; x is evaluated:

    u = g (SGD) or g / (√v̂ + ε) (AdamW), both at y, plus λ y
    z ← z - η u
    x ← (1 - c) x + c z                           c = η_max² / Σ η_max², η_max the largest η so far
    y = (1 - β) z + β x

The parameters hold y; x is computed from y and z. As in the authors' package v̂ is bias-corrected; the paper scales η by
√(1 - β2^t) instead, which differs only in the ε. Use a constant schedule with a warm-up. State tensors per parameter:
z, and v for AdamW. Defaults (paper and package): SGD β = 0.9; AdamW β = (0.9, 0.999), lr 0.0025, ε = 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_square_, root


class ScheduleFreeSGD(Rule):
    """Schedule-Free SGD: the update of the module docstring with u = g + λ y. momentum: β, above 0."""

    elementwise = True

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        _check_nonzero("momentum", momentum)
        self._initialise(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _initialise(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        """The rest of a constructor; AdamW's hyperparameters differ from SGD's."""
        super().__init__(params, hyperparameters | {"largest_lr": 0.0, "weight_sum": 0.0})

    def interpolation(self, group: dict[str, Any]) -> float:
        """β of a parameter group, the weight of x in y."""
        return float(group["momentum"])

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"fast": theta.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return bucket.g

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        for group in self.param_groups:
            group["largest_lr"] = max(group["largest_lr"], group["lr"])
            group["weight_sum"] += group["largest_lr"] ** 2

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        lr, beta, z = bucket["lr"], self.interpolation(bucket.group), bucket.state("fast")
        # All learning rates so far may be zero.
        c = bucket["largest_lr"] ** 2 / bucket["weight_sum"] if bucket["weight_sum"] else 0.0
        decay = bucket["weight_decay"]
        u = direction
        if decay and direction is bucket.g:
            u = torch._foreach_add(direction, bucket.theta, alpha=decay)
        elif decay:
            # AdamW's own tensors, which nobody else reads.
            torch._foreach_add_(u, bucket.theta, alpha=decay)
        # The new y directly from the old y and z, without forming x: (1 - c) y + c z + η (β (1 - c) - 1) u.
        torch._foreach_lerp_(bucket.theta, z, c)
        torch._foreach_add_(bucket.theta, u, alpha=lr * (beta * (1 - c) - 1))
        torch._foreach_sub_(z, u, alpha=lr)

    @torch.no_grad()
    def eval(self) -> None:
        """Move the parameters from y to x, for an evaluation; `train` moves them back."""
        self._interpolate(lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def train(self) -> None:
        """Move the parameters from x back to y."""
        self._interpolate(lambda beta: 1 - beta)

    def _interpolate(self, weight: Callable[[float], float]) -> None:
        """θ ← (1 - w) θ + w z with w = weight(β)."""
        for group in self.param_groups:
            for p in group["params"]:
                # A parameter that never had a gradient has x = y = z.
                if p in self.state:
                    # In z's dtype, which is float32 for narrow parameters.
                    z = self.state[p]["fast"]
                    p.copy_(torch.lerp(p.to(z.dtype), z, weight(self.interpolation(group))))


class ScheduleFreeAdamW(ScheduleFreeSGD):
    """Schedule-Free AdamW: the update of the module docstring with u = g / (√v̂ + ε) + λ y. betas: (β, β2), β > 0."""

    elementwise = True
    buffers = ("second_moment",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check_nonzero("betas[0]", betas[0])
        self._initialise(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def interpolation(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta2, second_moment = bucket["betas"][1], bucket.state("second_moment")
        average_square_(second_moment, bucket.g, beta2)
        return torch._foreach_div(bucket.g, root(second_moment, 1 - beta2**bucket.t, bucket["eps"]))


def _check_nonzero(name: str, value: float) -> None:
    """Raise ValueError if β is 0: then y = z, from which x cannot be computed."""
    if value == 0:
        raise ValueError(f"{name}=0: must be above 0, or the average cannot be computed from the parameters; raise it")
