"""MARS: Yuan, Liu, Wu, Zhou & Gu 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
arXiv:2411.10438, Algorithms 1 to 3. The gradient is corrected by how it changed since the previous weights:

    c = g_t + γ β1/(1 - β1) (g_t - g_{t-1}),   c ← c / max(1, ‖c‖) for each tensor
    MARS-AdamW: AdamW's update with c in place of g
    MARS-Lion: m ← β1 m + (1 - β1) c,   θ ← θ - η (sign(m) + λ θ)

where exactly g_{t-1} is the gradient of the present batch at the previous weights (Mars with `exact`: one more forward
and backward per step), and approximately that of the previous batch, which is kept. At the first step there is no
correction, as θ_0 = θ_1. Tensors of fewer than two dimensions are trained by AdamW, as in the authors' code.

`clip_norm` scales g_t alone, so leave it out with `exact`; c is clipped anyway. State: m (and v for MARS-AdamW), and
the previous gradient or, if exact, the previous weights. Defaults: the authors' code (γ = 0.025, β = (0.95, 0.99),
η = 3e-3, AdamW's η = 3e-3, β = (0.9, 0.95), λ = 0.1; λ = 0 for the matrices).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.needs import Need
from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import Group, ListRule, decay_weights, update_moments, working


class Mars(OptimizerSubmission):
    """Approximate; `kind` is adamw or lion."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        kind: str = "adamw",
        gamma: float = 0.025,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.1,
    ) -> None:
        if kind not in ("adamw", "lion"):
            raise ValueError(f"kind={kind}: must be adamw or lion")
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
        gamma: float = 0.025,
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

    def step(self, ctx: StepContext) -> None:
        self._gradient(ctx)
        there = ctx.gradients(at=self.previous)
        for optimizer in self.optimizers:
            if isinstance(optimizer, MarsRule):
                optimizer.at_previous = dict(zip(self.setup.parameters, there, strict=True))
        torch._foreach_copy_(self.previous, [parameter.detach() for parameter in self.setup.parameters])
        self.update(ctx)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.previous = state["previous"]

    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.previous


class MarsRule(ListRule):
    at_previous: dict[Tensor, Tensor] | None = None
    """Gradients of the present batch at the previous weights; without them the previous gradients serve."""

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        lr, beta1 = group["lr"], group["betas"][0]
        if self.at_previous is not None:
            previous = working([self.at_previous[p] for p in parameters])
        else:
            first = dict(zip(parameters, gradients, strict=True))
            previous = self.tensors(parameters, "previous_gradient", lambda p: first[p].clone())
        corrected = torch._foreach_sub(gradients, previous)
        torch._foreach_mul_(corrected, group["gamma"] * beta1 / (1 - beta1))
        torch._foreach_add_(corrected, gradients)
        norms = torch._foreach_norm(corrected)
        torch._foreach_clamp_min_(norms, 1.0)
        corrected = torch._foreach_div(corrected, norms)
        if self.at_previous is None:
            torch._foreach_copy_(previous, gradients)
        m = self.tensors(parameters, "exp_avg")
        if group["kind"] == "lion":
            torch._foreach_lerp_(m, corrected, 1 - beta1)
            direction = list(torch._foreach_sign(m))
        else:
            v = self.tensors(parameters, "exp_avg_sq")
            direction = update_moments(m, v, corrected, group["betas"], group["eps"], group["step"])
        decay_weights(parameters, lr, group["weight_decay"])
        torch._foreach_add_(parameters, direction, alpha=-lr)
