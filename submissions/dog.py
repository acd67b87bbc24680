"""DoG and L-DoG: Ivgi, Hinder & Carmon 2023, "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule",
arXiv:2302.12022. SGD whose step size is the distance travelled over the root of the summed squared gradients:

    r̄_t = max_{i ≤ t} ‖x_i - x_0‖ (at first r_ε (1 + ‖x_0‖)),   G_t = Σ_{i ≤ t} ‖g_i‖² + ε,   x ← x - c r̄_t / √G_t g_t

DoG takes the norms over all parameters, L-DoG over each tensor by itself. What is evaluated is the polynomially
decaying average of the iterates (Shamir & Zhang 2013), BatchNorm's statistics included, as in the authors' code:

    x̄_t = (1 - (1 + γ) / (t + γ)) x̄_{t-1} + (1 + γ) / (t + γ) x_t

The step size is its own schedule: that of the run has no effect. Weight decay is added to the gradient. State: x_0, x̄.
Defaults: the authors' code (c = 1, r_ε = 1e-6, or 1e-4 with BatchNorm; ε = 1e-8, γ = 8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.needs import Need
from harness.step import StepContext, swapped
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import GlobalRule, Group, working, working_dtype


class DoGRule(GlobalRule):
    layerwise = False

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        start = self.tensors(parameters, "start", lambda p: p.to(working_dtype(p), copy=True))
        here = working(parameters)
        if any(group["weight_decay"]):
            gradients = list(torch._foreach_add(gradients, torch._foreach_mul(here, group["weight_decay"])))
        sizes, travelled, squares = (
            torch.stack(list(torch._foreach_norm(tensors)))
            for tensors in (start, torch._foreach_sub(here, start), gradients)
        )
        squares.square_()
        if not self.layerwise:
            sizes, travelled = sizes.norm().expand_as(sizes), travelled.norm().expand_as(travelled)
            squares = squares.sum().expand_as(squares)
        first = dict(zip(parameters, group["reps_rel"] * (1 + sizes), strict=True))
        distance = self.tensors(parameters, "distance", lambda p: first[p].clone())
        total = self.tensors(parameters, "squares", lambda p: torch.full_like(first[p], group["eps"]))
        torch._foreach_maximum_(distance, travelled.unbind())
        torch._foreach_add_(total, squares.unbind())
        steps = torch._foreach_div(distance, torch._foreach_sqrt(total))
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, steps), alpha=-group["lr"])


class LDoGRule(DoGRule):
    layerwise = True


class _DoG(OptimizerSubmission):
    needs = frozenset({Need.EVALUATION_WEIGHTS})

    def __init__(
        self,
        setup: Setup,
        lr: float,
        reps_rel: float,
        eps: float,
        averaging_gamma: float,
        weight_decay: float,
        layerwise: bool,
    ) -> None:
        if reps_rel <= 0:
            raise ValueError(f"reps_rel={reps_rel}: must be above 0, or the weights never leave their start")
        own = {"lr": lr, "reps_rel": reps_rel, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, [(LDoGRule if layerwise else DoGRule)(setup.decay_groups(), own)])
        self.gamma, self.steps = averaging_gamma, 0
        self._averaged: list[Tensor] = [*(p.detach() for p in setup.parameters), *setup.statistics]
        self.average = [x.to(working_dtype(x), copy=True) for x in self._averaged]

    def apply_schedule(self, ctx: StepContext) -> None:
        """None: the rule is its own schedule."""

    def update(self, ctx: StepContext) -> None:
        super().update(ctx)
        self.steps += 1
        weight = (1 + self.gamma) / (self.steps + self.gamma)
        torch._foreach_lerp_(self.average, working(self._averaged), weight)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with swapped(self._averaged, self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average, self.steps = state["average"], state["steps"]

    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.average


class DoG(_DoG):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        reps_rel: float = 1e-6,
        eps: float = 1e-8,
        averaging_gamma: float = 8.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(setup, lr, reps_rel, eps, averaging_gamma, weight_decay, layerwise=False)


class LDoG(_DoG):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        reps_rel: float = 1e-6,
        eps: float = 1e-8,
        averaging_gamma: float = 8.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(setup, lr, reps_rel, eps, averaging_gamma, weight_decay, layerwise=True)
