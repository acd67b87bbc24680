"""Signum and signSGD: Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, "signSGD: Compressed Optimisation for
Non-Convex Problems", arXiv:1802.04434, Algorithms 1 and 2:

    m ← β m + (1 - β) g
    θ ← θ - η (sign(m) + λ θ)

signSGD is β = 0. Weight decay is decoupled. State: m, and none with β = 0. Default: β = 0.9 (paper), η = 1e-4 (ours).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_


class Signum(Rule):
    """Signum: the update of the module docstring. momentum: β; 0 is signSGD."""

    elementwise = True

    def __init__(self, params: ParamsT, lr: float = 1e-4, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(theta)} if group["momentum"] else {}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        if not bucket["momentum"]:
            return torch._foreach_sign(bucket.g)
        momentum = bucket.state("momentum")
        average_(momentum, bucket.g, bucket["momentum"])
        return torch._foreach_sign(momentum)
