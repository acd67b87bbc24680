"""MARS: Yuan, Liu, Wu, Zhou & Gu 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438, Algorithms 1 to 4. The gradient is corrected by how it changed since the previous weights:

    c = g_t + γ β1/(1 - β1) (g_t - g_{t-1}),   c ← c / max(1, ‖c‖) for each tensor
    MARS-AdamW: AdamW's update with c in place of g
    MARS-Lion: m ← β1 m + (1 - β1) c,   θ ← θ - η (sign(m) + λ θ)
    MARS-Shampoo: the same m; in place of its sign its orthogonal factor U Vᵀ, where m = U S Vᵀ, by Newton-Schulz,
                  times √max(1, rows / columns); filters [out, ...] count as matrices [out, the rest]

where exactly g_{t-1} is the gradient of the present batch at the previous weights (MarsExact: one more forward and
backward per step), and approximately that of the previous batch, which is kept (Mars). At the first step there is no
correction, as θ_0 = θ_1. Tensors of fewer than two dimensions are trained by AdamW, as in the authors' code.

`clip_norm` scales g_t alone, so leave it out with MarsExact; c is clipped anyway. State: m (and v for MARS-AdamW), and
the previous gradient or, if exact, the previous weights. Defaults: the authors' code (γ = 0.025, β = (0.95, 0.99),
η = 3e-3, AdamW's η = 3e-3, β = (0.9, 0.95), λ = 0.1; λ = 0 for the matrices).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.matrices import by_shape, orthogonalised
from submissions.rule import Bucket, Rule, Tensors, adam_direction, average_

KINDS = ("adamw", "lion", "shampoo")


class Mars(OptimizerSubmission):
    """Approximate."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        kind: str = "adamw",
        gamma: NonNegativeFloat = 0.025,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.1,
    ) -> None:
        names = [name for name, parameter in setup.named_parameters.items() if parameter.ndim >= 2]
        rest = [name for name in setup.named_parameters if name not in names]
        optimizers: list[torch.optim.Optimizer] = []
        if names:
            own: dict[str, Any] = {"lr": lr, "kind": kind, "gamma": gamma, "betas": betas, "eps": eps}
            optimizers.append(MarsRule(setup.decay_groups(names), own | {"weight_decay": weight_decay}))
        if rest:
            adamw: dict[str, Any] = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)


class MarsExact(Mars):
    """The previous gradient from the present batch."""

    needs = frozenset({Need.RE_EVALUATE})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        kind: str = "adamw",
        gamma: NonNegativeFloat = 0.025,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.1,
    ) -> None:
        super().__init__(
            setup, lr=lr, kind=kind, gamma=gamma, betas=betas, eps=eps, weight_decay=weight_decay, adamw_lr=adamw_lr,
            adamw_betas=adamw_betas, adamw_weight_decay=adamw_weight_decay,
        )  # fmt: skip
        self.previous = [parameter.detach().clone() for parameter in setup.parameters]

    @override
    def step(self, ctx: StepContext) -> None:
        self._gradient(ctx)
        there = ctx.gradients(params=self.previous)
        torch._foreach_copy_(self.previous, [parameter.detach() for parameter in self.setup.parameters])
        rules = [optimizer for optimizer in self.optimizers if isinstance(optimizer, MarsRule)]
        for rule in rules:
            rule.at_previous = dict(zip(self.setup.parameters, there, strict=True))
        self.update(ctx)
        for rule in rules:
            rule.at_previous = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": self.previous}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.previous = state["previous"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.previous


class MarsRule(Rule):
    at_previous: dict[Tensor, Tensor] | None = None
    """Gradients of the present batch at the previous weights; without them the previous gradients serve."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        if hyperparameters["kind"] not in KINDS:
            raise ValueError(f"kind={hyperparameters['kind']}: must be one of {', '.join(KINDS)}")
        super().__init__(params, hyperparameters)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"momentum": torch.zeros_like(theta)}
        if group["kind"] == "adamw":
            state["second_moment"] = torch.zeros_like(theta)
        return state if self.at_previous is not None else state | {"last_gradient": g.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1 = bucket["betas"][0]
        if self.at_previous is None:
            last = bucket.state("last_gradient")
        else:
            last = [self.at_previous[p].to(g.dtype) for p, g in zip(bucket.parameters, bucket.g, strict=True)]
        corrected = torch._foreach_sub(bucket.g, last)
        torch._foreach_mul_(corrected, bucket["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, bucket.g)
        norms = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(norms, 1.0)
        corrected = torch._foreach_div(corrected, norms)
        if self.at_previous is None:
            torch._foreach_copy_(last, bucket.g)
        momentum = bucket.state("momentum")
        if bucket["kind"] == "adamw":
            return adam_direction(
                momentum, bucket.state("second_moment"), corrected, bucket["betas"], bucket["eps"], bucket.t
            )
        average_(momentum, corrected, beta1)
        return torch._foreach_sign(momentum) if bucket["kind"] == "lion" else _orthogonal_factors(momentum)


def _orthogonal_factors(momentum: Tensors) -> Tensors:
    directions = list(momentum)
    for places in by_shape(momentum):
        matrices = torch.stack([momentum[place].flatten(1) for place in places])
        scale = math.sqrt(max(1.0, matrices.shape[1] / matrices.shape[2]))
        for place, direction in zip(places, (orthogonalised(matrices) * scale).unbind(), strict=True):
            directions[place] = direction.view_as(momentum[place])
    return directions
