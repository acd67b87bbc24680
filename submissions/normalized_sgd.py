"""Normalised SGD with momentum: Cutkosky & Mehta 2020, "Momentum Improves Normalized SGD", arXiv:2002.03305, Algorithm
1:

    m ← β m + (1 - β) g
    θ ← θ - η (m / ‖m‖ + λ θ)

‖m‖ is over all parameters, or with `per_tensor` over each tensor. Weight decay is decoupled. State: m. Default: β =
0.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_

TINY = 1e-30


class NormalizedSGD(Rule):
    """Normalised SGD: the update of the module docstring. momentum: β."""

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        per_tensor: bool = False,
    ) -> None:
        hyperparameters = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters | {"per_tensor": per_tensor})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        squares: list[Tensor] = []
        for bucket in buckets:
            momentum = bucket.state("momentum")
            average_(momentum, bucket.g, bucket["momentum"])
            bucket.scratch["norms"] = list(torch._foreach_norm(momentum))
            squares += [norm.square() for norm in bucket.scratch["norms"]]
        for bucket in buckets:
            if not bucket["per_tensor"]:
                total = torch.stack(squares).sum().sqrt()
                bucket.scratch["norms"] = [total] * len(bucket.theta)

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        norms = [norm.clamp_min(TINY) for norm in bucket.scratch["norms"]]
        return torch._foreach_div(bucket.state("momentum"), norms)
