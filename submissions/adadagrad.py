"""AdAdaGrad and AdAdaGradNorm: Lau, Liu & Kolar 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods", arXiv:2402.11215. AdaGrad, with a batch that grows as soon as the noise of its gradient outweighs its norm
(the norm test, Algorithms 1 and 2):

    b ← max{ b, ⌈ ‖Var ∇ℓ‖₁ / (η² ‖ḡ‖²) ⌉ },   Var over the examples of the batch
    AdAdaGrad: G ← G + ḡ²,   θ ← θ - lr ḡ / (√G + ε);   AdAdaGradNorm: G ← G + ‖ḡ‖², one number

The variance over examples is estimated from the gradients of micro-batches, of which there are at least `pieces`: that
of a mean of s examples, times s (per-example gradients are costly, and undefined with BatchNorm). The batch starts at
`initial_batch` and stays within `max_batch`, both in nominal batches, and is rounded up to whole micro-batches. Weight
decay is added to the gradient. State: G and b. Defaults: η = 0.5 (within the paper's 0.1 to 0.8), ε as in torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from harness.needs import Need
from harness.seeding import ExampleStream, Selection
from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import GlobalRule, Group, inner_product, working
from submissions.vrgd import mean_and_squares


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
        if pieces < 2:
            raise ValueError(f"pieces={pieces}: must be at least 2, since one has no variance")
        if eta <= 0:
            raise ValueError(f"eta={eta}: must be above 0")
        if not 0 < initial_batch <= max_batch:
            raise ValueError(f"initial_batch={initial_batch}: must lie above 0 and not above max_batch={max_batch}")
        super().__init__(setup, [optimizer])
        self.eta, self.pieces = eta, pieces
        self.largest = self._whole(max_batch * setup.nominal_batch)
        self.batch = min(self.largest, self._whole(initial_batch * setup.nominal_batch))

    def select(self, stream: ExampleStream) -> Selection:
        return stream.take(self.batch)

    def step(self, ctx: StepContext) -> None:
        pieces = ctx.micro_batch_gradients(self.pieces)
        mean, squares = mean_and_squares(pieces)
        for parameter, gradient in zip(self.setup.parameters, mean, strict=True):
            parameter.grad = gradient
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

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"batch": self.batch}

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
        eta: float = 0.5,
        initial_batch: float = 0.25,
        max_batch: float = 4.0,
        pieces: int = 4,
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
        eta: float = 0.5,
        initial_batch: float = 0.25,
        max_batch: float = 4.0,
        pieces: int = 4,
    ) -> None:
        own = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        rule = AdaGradNormRule(setup.decay_groups(), own)
        super().__init__(setup, rule, eta, initial_batch, max_batch, pieces)


class AdaGradNormRule(GlobalRule):
    """AdaGrad with one step size for all (Ward, Wu & Bottou 2019, arXiv:1806.01811)."""

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        if any(group["weight_decay"]):
            decayed = torch._foreach_mul(working(parameters), group["weight_decay"])
            gradients = list(torch._foreach_add(gradients, decayed))
        squared = inner_product(gradients, gradients)
        total = self.shared("squares", lambda: torch.zeros_like(squared)).add_(squared)
        torch._foreach_sub_(parameters, torch._foreach_mul(gradients, group["lr"] / (total.sqrt() + group["eps"])))
