"""AdAdaGrad and AdAdaGradNorm: Lau, Liu & Kolar 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods", arXiv:2402.11215. AdaGrad, with a batch that grows as soon as the noise of its gradient outweighs its norm
(the norm test, Algorithms 1 and 2):

    b ← max{ b, ⌈ ‖Var ∇ℓ‖₁ / (η² ‖ḡ‖²) ⌉ },   Var over the examples of the batch
    AdAdaGrad: G ← G + ḡ²,   θ ← θ - lr ḡ / (√G + ε);   AdAdaGradNorm: G ← G + ‖ḡ‖², one number

The variance over examples is estimated from the gradients of micro-batches, of which there are at least `pieces`: that
of a mean of s examples, times s (per-example gradients are costly, and undefined with BatchNorm). The batch starts at
`initial_batch` and stays within `max_batch`, both in nominal batches, and is rounded up to whole micro-batches. Weight
decay is added to the gradient. State: G and b. The paper has η in (0, 1) and tunes it; the default 0.5 and those of the
bounds of the batch are ours, ε is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import ExampleStream, Need, OptimizerSubmission, Selection, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, inner_product
from submissions.vrgd import Pieces, mean_and_squares


class _AdaptiveBatch(OptimizerSubmission):
    needs = frozenset({Need.SELECTION, Need.MICRO_BATCH_GRADIENTS})

    def __init__(
        self,
        setup: Setup,
        optimizer: torch.optim.Optimizer,
        eta: float,
        initial_batch: float,
        max_batch: float,
        pieces: int,
    ) -> None:
        if initial_batch > max_batch:
            raise ValueError(f"initial_batch={initial_batch}: must not be above max_batch={max_batch}")
        super().__init__(setup, [optimizer])
        self.eta, self.pieces = eta, pieces
        self.largest = self._whole(max_batch * setup.nominal_batch)
        self.batch = min(self.largest, self._whole(initial_batch * setup.nominal_batch))

    @override
    def select(self, stream: ExampleStream) -> Selection:
        return stream.take(self.batch)

    @override
    def step(self, ctx: StepContext) -> None:
        pieces = ctx.micro_batch_gradients(self.pieces)
        mean, squares = mean_and_squares(pieces)
        signal = inner_product(mean, mean)
        spread = torch.stack([s.sum() for s in squares]).sum() - signal
        variance = spread * (len(pieces) / max(1, len(pieces) - 1)) * (ctx.batch_size / len(pieces))
        # The next batch is chosen on the host, so this waits for the device.
        wanted = float(variance / (self.eta**2 * signal))
        if math.isfinite(wanted):
            self.batch = min(self.largest, max(self.batch, self._whole(wanted)))
        self.clip_gradients()
        self.update(ctx)

    def _whole(self, examples: float) -> int:
        return math.ceil(examples / self.pieces) * self.pieces

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch": self.batch}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch = state["batch"]


class AdAdaGrad(_AdaptiveBatch):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        eta: PositiveFloat = 0.5,
        initial_batch: PositiveFloat = 0.25,
        max_batch: PositiveFloat = 4.0,
        pieces: Pieces = 4,
    ) -> None:
        groups = setup.decay_groups()
        adagrad = torch.optim.Adagrad(groups, lr=lr, eps=eps, weight_decay=weight_decay, foreach=True)
        super().__init__(setup, adagrad, eta, initial_batch, max_batch, pieces)


class AdAdaGradNorm(_AdaptiveBatch):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        eta: PositiveFloat = 0.5,
        initial_batch: PositiveFloat = 0.25,
        max_batch: PositiveFloat = 4.0,
        pieces: Pieces = 4,
    ) -> None:
        rule = AdaGradNormRule(setup.decay_groups(), lr, eps, weight_decay)
        super().__init__(setup, rule, eta, initial_batch, max_batch, pieces)


class AdaGradNormRule(Rule):
    """AdaGrad with one step size for all (Ward, Wu & Bottou 2019, arXiv:1806.01811)."""

    def __init__(self, params: ParamsT, lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        gradients = [torch._foreach_add(bucket.g, bucket.theta, alpha=bucket["weight_decay"]) for bucket in buckets]
        if gradients:
            squared = torch.stack([inner_product(g, g) for g in gradients]).sum()
            total = self.shared("squares", lambda: torch.zeros_like(squared)).add_(squared)
        for bucket, g in zip(buckets, gradients, strict=True):
            bucket.scratch["direction"] = torch._foreach_div(g, total.sqrt() + bucket["eps"])

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        direction: Tensors = bucket.scratch["direction"]
        return direction

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
