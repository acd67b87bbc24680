"""Batches κ times larger than the nominal one; the hyperparameters are given for the nominal batch and scaled.

Linear rule for SGD: Goyal et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677,
section 2.1 (η → κ η, all else unchanged) and 2.2 (gradual warm-up: the schedule's, which counts examples). Their
momentum correction (remark 2) is not needed: the momentum buffer of torch's SGD contains no learning rate.

Square-root rules for RMSprop and Adam: Malladi, Lyu, Panigrahi & Arora 2022, "On the SDEs and Scaling Rules for
Adaptive Gradient Algorithms", arXiv:2205.10287, definitions 5.2 and 5.3:

    η → √κ η,   1 - β → κ (1 - β) for every β,   ε → ε / √κ

The paper has no weight decay. Here λ → √κ λ, which keeps the decoupled decay per example, (η λ) / batch, unchanged. The
last batch may exceed the budget. State: the optimizer's. Defaults: torch's, and κ = 2.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import PositiveInt
from typing_extensions import override

from harness.interface import ExampleStream, Need, OptimizerSubmission, Selection, Setup


class _LargeBatchSubmission(OptimizerSubmission):
    """The default step on batches of `batch_factor` nominal batches."""

    needs = frozenset({Need.SELECTION})
    batch_factor: int
    """κ."""

    @override
    def select(self, stream: ExampleStream) -> Selection:
        return stream.take(self.batch_factor * self.setup.nominal_batch)


class LargeBatchSGD(_LargeBatchSubmission):
    """SGD on larger batches with the linear rule. batch_factor: κ."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-4,
        batch_factor: PositiveInt = 2,
    ) -> None:
        sgd = torch.optim.SGD(
            setup.decay_groups(), lr=lr * batch_factor, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
            fused=True,
        )  # fmt: skip
        super().__init__(setup, [sgd])
        self.batch_factor = batch_factor


class LargeBatchAdamW(_LargeBatchSubmission):
    """AdamW on larger batches with the square-root rule. batch_factor: κ."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        batch_factor: PositiveInt = 2,
    ) -> None:
        beta1, beta2 = _scale_betas("betas", betas, batch_factor)
        root = batch_factor**0.5
        adamw = torch.optim.AdamW(
            setup.decay_groups(), lr=lr * root, betas=(beta1, beta2), eps=eps / root, weight_decay=weight_decay * root,
            fused=True,
        )  # fmt: skip
        super().__init__(setup, [adamw])
        self.batch_factor = batch_factor


class LargeBatchRMSprop(_LargeBatchSubmission):
    """RMSprop on larger batches with the square-root rule. batch_factor: κ."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        alpha: Annotated[float, Interval(ge=0, lt=1)] = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        batch_factor: PositiveInt = 2,
    ) -> None:
        (scaled,) = _scale_betas("alpha", (alpha,), batch_factor)
        root = batch_factor**0.5
        rmsprop = torch.optim.RMSprop(
            setup.decay_groups(), lr=lr * root, alpha=scaled, eps=eps / root, weight_decay=weight_decay, foreach=True
        )
        super().__init__(setup, [rmsprop])
        self.batch_factor = batch_factor


def _scale_betas(name: str, betas: tuple[float, ...], batch_factor: int) -> tuple[float, ...]:
    """Decay rates whose averages have the same length in examples. Raises ValueError where none has."""
    scaled = tuple(1 - batch_factor * (1 - beta) for beta in betas)
    if min(scaled) < 0:
        shown = betas if len(betas) > 1 else betas[0]
        raise ValueError(
            f"{name}={shown} with batch_factor={batch_factor}: 1 - β times the factor must be at most 1; "
            "raise β or lower batch_factor"
        )
    return scaled
