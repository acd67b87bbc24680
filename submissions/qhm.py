"""Quasi-hyperbolic momentum (QHM): Ma & Yarats 2019, "Quasi-hyperbolic momentum and Adam for deep learning",
arXiv:1810.06801, equations 3 and 4. SGD on a mixture of the gradient and its average:

    m ← β m + (1 - β) g
    θ ← θ - η ((1 - ν) g + ν m + λ θ)

ν = 0 is SGD, ν = 1 momentum as an average, ν = β Nesterov's. Weight decay is decoupled. State: m. Defaults (paper): β =
0.999, ν = 0.7.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_


class QHM(Rule):
    """QHM: the update of the module docstring. momentum: β. nu: ν."""

    elementwise = True
    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.999,
        nu: Annotated[float, Interval(ge=0, le=1)] = 0.7,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nu": nu, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        average_(momentum, bucket.g, bucket["momentum"])
        return torch._foreach_lerp(bucket.g, momentum, bucket["nu"])
