"""SGD-SaI: Xu, Zhang, Cai, Xiao & Li 2024, "No More Adam: Learning Rate Scaling at Initialization is All You Need",
arXiv:2412.11768, Algorithm 1. SGD with momentum whose learning rate is scaled for each tensor, once and for all, by the
signal-to-noise ratio of its first gradient g_1:

    s = ‖g_1‖ / (std(g_1) + ε)
    m ← μ m + (1 - μ) g,   θ ← θ - η λ θ,   θ ← θ - η s m

For tensors of one dimension, of one row, or without spread s = ‖g_1‖, as in the authors' code. State: m, and one number
per tensor. Defaults: the authors' code (η = 1e-2, μ = 0.9, λ = 1e-2, ε = 1e-8).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from submissions.list_rule import Group, ListRule, decay_weights


class SGDSaI(ListRule):
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        first = dict(zip(parameters, gradients, strict=True))
        scales = self.tensors(parameters, "signal_to_noise", lambda p: _signal_to_noise(first[p], group["eps"]))
        m = self.tensors(parameters, "momentum")
        torch._foreach_lerp_(m, gradients, 1 - group["momentum"])
        decay_weights(parameters, group["lr"], group["weight_decay"])
        torch._foreach_add_(parameters, torch._foreach_mul(m, scales), alpha=-group["lr"])


def _signal_to_noise(gradient: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(gradient)
    if gradient.ndim < 2 or len(gradient) == 1:
        return norm
    spread = gradient.std()
    return torch.where(spread == 0, norm, norm / (spread + eps))
