"""Online L-BFGS (oLBFGS): Schraudolph, Yu & Günter 2007, "A Stochastic Quasi-Newton Method for Online Convex
Optimization", AISTATS. Both gradients of a curvature pair are of the same batch, so that their difference is no noise:

    p = -H g(θ),   θ⁺ = θ + η (p - λ θ),   s = θ⁺ - θ,   y = g(θ⁺) - g(θ) + δ s

H g is the two-loop recursion over the last k pairs with sᵀy > 0, begun with the mean of sᵀy / yᵀy over them (Liu &
Nocedal 1989; without a pair, H = 1/‖g‖). p is scaled down to `largest_step`, in the norm over all parameters. Two
forward and backward passes per step. State: 2k tensors per parameter. Defaults: k = 10 (paper), δ = 0.1, η = 0.1 and
largest_step = 1 (ours).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import inner_product

TINY = 1e-30


class OnlineLBFGS(OptimizerSubmission):
    """oLBFGS as in the module docstring. history: k. curvature: δ."""

    needs = frozenset({Need.RE_EVALUATE})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        history: PositiveInt = 10,
        curvature: NonNegativeFloat = 0.1,
        largest_step: PositiveFloat = 1.0,
    ) -> None:
        # Its groups hold the learning rate, which the schedule sets; it is never stepped.
        groups = torch.optim.SGD(setup.decay_groups(), lr=lr, weight_decay=weight_decay)
        super().__init__(setup, [groups])
        self.history, self.curvature, self.largest = history, curvature, largest_step
        # The oldest pair first.
        self.steps: list[list[Tensor]] = []
        self.changes: list[list[Tensor]] = []

    @override
    def step(self, ctx: StepContext) -> None:
        self._gradient(ctx)
        self.apply_schedule(ctx)
        active = [p for p in self.setup.parameters if p.grad is not None and p.numel()]
        before, gradients = [p.detach().clone() for p in active], [p.grad.clone() for p in active if p.grad is not None]
        directions = self._direction(gradients)
        groups = {p: group for group in self.optimizers[0].param_groups for p in group["params"]}
        with torch.no_grad():
            for p, direction in zip(active, directions, strict=True):
                group = groups[p]
                p.add_(direction + group["weight_decay"] * p, alpha=-group["lr"])
        # At the new weights, and clipped like the first ones.
        ctx.backward()
        self.clip_gradients()
        moved = torch._foreach_sub([p.detach() for p in active], before)
        changed = torch._foreach_sub([p.grad for p in active if p.grad is not None], gradients)
        torch._foreach_add_(changed, moved, alpha=self.curvature)
        self.steps, self.changes = [*self.steps, list(moved)], [*self.changes, list(changed)]
        self.steps, self.changes = self.steps[-self.history :], self.changes[-self.history :]

    def _direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """H g, at most `largest_step` long; pairs without positive curvature count for nothing."""
        q = [g.clone() for g in gradients]
        if not self.steps:
            norm = inner_product(q, q).sqrt().clamp_min(TINY)
            return self._limit(list(torch._foreach_div(q, norm)))
        products = [inner_product(s, y) for s, y in zip(self.steps, self.changes, strict=True)]
        inverses = [torch.where(product > 0, 1 / product.clamp_min(TINY), 0.0) for product in products]
        weights = []
        for s, y, inverse in zip(reversed(self.steps), reversed(self.changes), reversed(inverses), strict=True):
            weight = inverse * inner_product(s, q)
            weights.append(weight)
            torch._foreach_sub_(q, torch._foreach_mul(y, weight))
        squares = [inner_product(y, y).clamp_min(TINY) for y in self.changes]
        scales = torch.stack([product / square for product, square in zip(products, squares, strict=True)])
        usable = torch.stack(products) > 0
        count = usable.sum().clamp_min(1)
        torch._foreach_mul_(q, torch.where(usable, scales, 0.0).sum() / count)
        for s, y, inverse, weight in zip(self.steps, self.changes, inverses, reversed(weights), strict=True):
            torch._foreach_add_(q, torch._foreach_mul(s, weight - inverse * inner_product(y, q)))
        return self._limit(q)

    def _limit(self, direction: list[Tensor]) -> list[Tensor]:
        norm = inner_product(direction, direction).sqrt()
        return list(torch._foreach_mul(direction, (self.largest / norm.clamp_min(TINY)).clamp_max(1.0)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps, "changes": self.changes}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps, self.changes = state["steps"], state["changes"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + [t for tensors in (*self.steps, *self.changes) for t in tensors]
