"""DoG and L-DoG (distance over gradients): Ivgi, Hinder & Carmon 2023, "DoG is SGD's Best Friend: A Parameter-Free
Dynamic Step Size Schedule", arXiv:2302.12022. SGD with a step size that needs no tuning:

    r ← max(r, ‖θ - θ₀‖)                          r = reps_rel (1 + ‖θ₀‖) at the first step
    G ← G + ‖g‖²                                  G = ε at the start
    θ ← θ - η (r / √G) g

over all parameters together (DoG) or for each tensor (L-DoG). η is 1. Weight decay is part of the gradient, as in the
authors' package. The paper evaluates a polynomial average of the iterates (submissions.averaging). State per parameter:
θ₀, and two numbers for L-DoG. Defaults: reps_rel = 1e-6 (1e-4 with batch norm), ε = 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class DoG(Rule):
    """DoG: one step size for all parameters. reps_rel: relative size of the first distance r."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        reps_rel: PositiveFloat = 1e-6,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        hyperparameters = {"lr": lr, "reps_rel": reps_rel, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"start": theta.clone()}

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        if not buckets:
            return
        first = buckets[0]
        squares = _sum_of_squares([torch._foreach_norm(_gradient_with_decay(bucket)) for bucket in buckets])

        def first_distance() -> Tensor:
            start = _sum_of_squares([torch._foreach_norm(bucket.theta) for bucket in buckets])
            return first["reps_rel"] * (1 + start.sqrt())

        # r and G are float64 numbers on the device of the parameters: nothing waits for them.
        gradients = self.shared("gradients", lambda: torch.full_like(squares, first["eps"])).add_(squares)
        distance = self.shared("distance", first_distance)
        moved = _sum_of_squares(
            [torch._foreach_norm(torch._foreach_sub(bucket.theta, bucket.state("start"))) for bucket in buckets]
        )
        torch.maximum(distance, moved.sqrt(), out=distance)
        for bucket in buckets:
            bucket.scratch["step_size"] = (distance / gradients.sqrt()).to(bucket.theta[0].dtype)

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return torch._foreach_mul(_gradient_with_decay(bucket), bucket.scratch["step_size"])

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])


class LDoG(DoG):
    """L-DoG: a step size for each tensor."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        distance = group["reps_rel"] * (1 + theta.norm())
        return {"start": theta.clone(), "distance": distance, "gradients": theta.new_full((), group["eps"])}

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        # DoG's sums over all parameters are not needed.
        pass

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        distance, gradients, g = bucket.state("distance"), bucket.state("gradients"), _gradient_with_decay(bucket)
        if bucket.t > 1:
            moved = torch._foreach_norm(torch._foreach_sub(bucket.theta, bucket.state("start")))
            torch._foreach_maximum_(distance, moved)
        norms = torch._foreach_norm(g)
        torch._foreach_addcmul_(gradients, norms, norms)
        return torch._foreach_mul(g, torch._foreach_div(distance, torch._foreach_sqrt(gradients)))


def _gradient_with_decay(bucket: Bucket) -> Tensors:
    """g + λ θ; the gradients themselves where λ is zero."""
    return (
        torch._foreach_add(bucket.g, bucket.theta, alpha=bucket["weight_decay"]) if bucket["weight_decay"] else bucket.g
    )


def _sum_of_squares(norms: list[Tensors]) -> Tensor:
    """The sum of the squares of all norms of all buckets, a float64 scalar."""
    return torch.stack([norm for of_bucket in norms for norm in of_bucket]).square().sum().double()
