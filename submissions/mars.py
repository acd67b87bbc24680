"""MARS: Yuan, Liu, Wu, Zhou & Gu 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438, Algorithms 1 to 4. The gradient is corrected by its change since the previous weights:

    c = g_t + γ β1/(1 - β1) (g_t - g_{t-1}),   c ← c / max(1, ‖c‖) for each tensor
    MARS-AdamW: AdamW's update with c in place of g
    MARS-Lion: m ← β1 m + (1 - β1) c,   θ ← θ - η (sign(m) + λ θ)
    MARS-Shampoo: the same m; in place of its sign the orthogonal factor U Vᵀ of m = U S Vᵀ, by Newton-Schulz,
                  times √max(1, rows / columns)

MarsExact computes g_{t-1} as the gradient of the present batch at the previous weights, which costs one more forward
and backward per step. Mars approximates it by the gradient of the previous batch, which it keeps. The first step has no
correction, since θ_0 = θ_1. AdamW trains all tensors that do not have two dimensions, as in the authors' code:
convolutions too, while embeddings and heads are MARS's.

`clip_norm` scales g_t but not g_{t-1}, so do not use it with MarsExact; c is clipped anyway. State: m (and v for
MARS-AdamW), and the previous gradient or, if exact, the previous weights. Defaults: the authors' code (γ = 0.025,
β = (0.95, 0.99), η = 3e-3, AdamW's η = 3e-3, β = (0.9, 0.95), λ = 0.1; λ = 0 for the matrices).
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
from submissions.matrices import group_by_shape
from submissions.polar import orthogonalise
from submissions.rule import Bucket, Rule, Tensors, adam_direction, average_

KINDS = ("adamw", "lion", "shampoo")


class Mars(OptimizerSubmission):
    """MARS with the approximate correction. kind: adamw, lion or shampoo. gamma: γ."""

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
        matrices = [name for name, parameter in setup.named_parameters.items() if parameter.ndim == 2]
        rest = [name for name in setup.named_parameters if name not in matrices]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            mars: dict[str, Any] = {"lr": lr, "kind": kind, "gamma": gamma, "betas": betas, "eps": eps}
            optimizers.append(MarsRule(setup.decay_groups(matrices), mars | {"weight_decay": weight_decay}))
        if rest:
            adamw: dict[str, Any] = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)


class MarsExact(Mars):
    """MARS with the exact correction; hyperparameters as of `Mars`."""

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
        # In this order: only the first pass of a step updates BatchNorm's statistics, so it must be the present one.
        self._gradient(ctx)
        previous_gradients = ctx.gradients(params=self.previous)
        torch._foreach_copy_(self.previous, [parameter.detach() for parameter in self.setup.parameters])
        rules = [optimizer for optimizer in self.optimizers if isinstance(optimizer, MarsRule)]
        for rule in rules:
            rule.previous_gradients = dict(zip(self.setup.parameters, previous_gradients, strict=True))
        self.update(ctx)
        # Gradients must not live until the next step.
        for rule in rules:
            rule.previous_gradients = None

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
    """The updates of the module docstring."""

    previous_gradients: dict[Tensor, Tensor] | None = None
    """By parameter the gradients of the present batch at the previous weights. None: use those of the last step."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        if hyperparameters["kind"] not in KINDS:
            raise ValueError(f"kind={hyperparameters['kind']}: must be one of {', '.join(KINDS)}; correct it")
        super().__init__(params, hyperparameters)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"momentum": torch.zeros_like(theta)}
        if group["kind"] == "adamw":
            state["second_moment"] = torch.zeros_like(theta)
        # Starting at g itself leaves the first step without a correction.
        return state if self.previous_gradients is not None else state | {"last_gradient": g.clone()}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1 = bucket["betas"][0]
        if self.previous_gradients is None:
            last = bucket.state("last_gradient")
        else:
            last = bucket.look_up(self.previous_gradients)
        corrected = torch._foreach_sub(bucket.g, last)
        torch._foreach_mul_(corrected, bucket["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, bucket.g)
        norms = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(norms, 1.0)
        corrected = torch._foreach_div(corrected, norms)
        # After its last use: this overwrites `last` in the state.
        if self.previous_gradients is None:
            torch._foreach_copy_(last, bucket.g)
        momentum = bucket.state("momentum")
        if bucket["kind"] == "adamw":
            return adam_direction(
                momentum, bucket.state("second_moment"), corrected, bucket["betas"], bucket["eps"], bucket.t
            )
        average_(momentum, corrected, beta1)
        return torch._foreach_sign(momentum) if bucket["kind"] == "lion" else _orthogonalise_all(momentum)


def _orthogonalise_all(momentum: Tensors) -> Tensors:
    """MARS-Shampoo's direction for each tensor, in its shape; empty tensors are returned as they are."""
    directions = list(momentum)
    for indices in group_by_shape(momentum):
        matrices = torch.stack([momentum[index].flatten(1) for index in indices])
        scale = math.sqrt(max(1.0, matrices.shape[1] / matrices.shape[2]))
        for index, direction in zip(indices, (orthogonalise(matrices) * scale).unbind(), strict=True):
            directions[index] = direction.view_as(momentum[index])
    return directions
