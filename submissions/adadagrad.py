"""AdAdaGrad and AdAdaGradNorm: Lau, Liu & Kolar 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods", arXiv:2402.11215. AdaGrad with a batch that grows when the noise of its gradient exceeds its norm (the norm
test, Algorithms 1 and 2):

    b ← max{ b, ⌈ ‖Var ∇ℓ‖₁ / (η² ‖ḡ‖²) ⌉ },   Var over the examples of the batch
    AdAdaGrad: G ← G + ḡ²,   θ ← θ - lr ḡ / (√G + ε);   AdAdaGradNorm: G ← G + ‖ḡ‖², one number

The variance over examples is estimated from at least `pieces` micro-batches: the variance of a mean of s examples,
times s. (Per-example gradients are costly, and undefined with BatchNorm.) The batch starts at `initial_batch` and stays
within `max_batch`, both in nominal batches; it is rounded up to a multiple of `pieces`. Weight decay is added to the
gradient. The host chooses the next batch, and waits for the device once a step for it. State: G and b. The paper tunes
η in (0, 1). The default η = 0.5 and the bounds of the batch are ours; ε is torch's.
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
from submissions.vrgd import MicroBatchCount, mean_and_mean_square


class _AdaptiveBatchSubmission(OptimizerSubmission):
    """An optimizer whose batch size b follows the norm test, the first equation of the module docstring."""

    needs = frozenset({Need.SELECTION, Need.MICRO_BATCH_GRADIENTS})
    host_waits = "each step"

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
            raise ValueError(
                f"initial_batch={initial_batch}: must not be above max_batch={max_batch}; lower it or raise max_batch"
            )
        super().__init__(setup, [optimizer])
        self.eta, self.pieces = eta, pieces
        self.max_batch = self._round_up(max_batch * setup.nominal_batch)
        self.batch = min(self.max_batch, self._round_up(initial_batch * setup.nominal_batch))

    @override
    def select(self, stream: ExampleStream) -> Selection:
        return stream.take(self.batch)

    @override
    def step(self, ctx: StepContext) -> None:
        gradients = ctx.micro_batch_gradients(self.pieces)
        count = len(gradients)
        mean, mean_square = mean_and_mean_square(gradients)
        squared_norm = inner_product(mean, mean)
        biased_variance = torch.stack([s.sum() for s in mean_square]).sum() - squared_norm
        # Unbiased over the micro-batches, then from a mean of batch_size / count examples to single examples.
        variance = biased_variance * (count / max(1, count - 1)) * (ctx.batch_size / count)
        # The next batch is chosen on the host, so this waits for the device.
        required_batch = float(variance / (self.eta**2 * squared_norm))
        # Not finite where the mean gradient is zero or the trial diverges.
        if math.isfinite(required_batch):
            self.batch = min(self.max_batch, max(self.batch, self._round_up(required_batch)))
        self.clip_gradients()
        self.update(ctx)

    def _round_up(self, examples: float) -> int:
        """The next multiple of `pieces`, so that the batch can be cut into equal parts."""
        return math.ceil(examples / self.pieces) * self.pieces

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch": self.batch}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch = state["batch"]


class AdAdaGrad(_AdaptiveBatchSubmission):
    """AdAdaGrad: torch's AdaGrad with the norm test.

    eta: η of the norm test. initial_batch, max_batch: bounds of the batch, in nominal batches. pieces: least number of
    micro-batches for the variance.
    """

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
        pieces: MicroBatchCount = 4,
    ) -> None:
        groups = setup.decay_groups()
        adagrad = torch.optim.Adagrad(groups, lr=lr, eps=eps, weight_decay=weight_decay, foreach=True)
        super().__init__(setup, adagrad, eta, initial_batch, max_batch, pieces)


class AdAdaGradNorm(_AdaptiveBatchSubmission):
    """AdAdaGradNorm: one step size for all parameters, with the norm test; hyperparameters as of `AdAdaGrad`."""

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
        pieces: MicroBatchCount = 4,
    ) -> None:
        rule = AdaGradNormRule(setup.decay_groups(), lr, eps, weight_decay)
        super().__init__(setup, rule, eta, initial_batch, max_batch, pieces)


class AdaGradNormRule(Rule):
    """AdaGrad with one step size for all parameters (Ward, Wu & Bottou 2019, arXiv:1806.01811)."""

    def __init__(self, params: ParamsT, lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        gradients = [torch._foreach_add(bucket.g, bucket.theta, alpha=bucket["weight_decay"]) for bucket in buckets]
        if gradients:
            squared_norm = torch.stack([inner_product(g, g) for g in gradients]).sum()
            sum_of_squares = self.shared("squares", lambda: torch.zeros_like(squared_norm)).add_(squared_norm)
        for bucket, g in zip(buckets, gradients, strict=True):
            bucket.scratch["direction"] = torch._foreach_div(g, sum_of_squares.sqrt() + bucket["eps"])

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        direction: Tensors = bucket.scratch["direction"]
        return direction

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # Weight decay is in the direction already.
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
