"""SGD-SaI: Xu, Zhang, Cai, Xiao & Li 2024, "No More Adam: Learning Rate Scaling at Initialization is All You Need",
arXiv:2412.11768, Algorithm 1. SGD with momentum; the learning rate of each tensor is scaled by a constant, the
signal-to-noise ratio of its first gradient g_1:

    s = ‖g_1‖ / (std(g_1) + ε)
    m ← μ m + (1 - μ) g,   θ ← θ - η λ θ,   θ ← θ - η s m

As in the authors' code s = ‖g_1‖ for tensors of one dimension or of one row, and where std(g_1) = 0. State: m, and one
number per tensor. Defaults: the authors' code (η = 1e-2, μ = 0.9, λ = 1e-2, ε = 1e-8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_


class SGDSaI(Rule):
    """SGD-SaI: the update of the module docstring. momentum: μ."""

    elementwise = True
    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        scale = torch.linalg.vector_norm(g)
        # The comparison waits for the device, once for each tensor of a trial.
        if g.ndim >= 2 and len(g) > 1 and g.std() > 0:
            scale = scale / (g.std() + group["eps"])
        return super().initial_state(theta, g, group) | {"signal_to_noise": scale}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        average_(momentum, bucket.g, bucket["momentum"])
        return torch._foreach_mul(momentum, bucket.state("signal_to_noise"))
