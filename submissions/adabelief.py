"""AdaBelief: Zhuang et al. 2020, "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
arXiv:2010.07468, Algorithm 2. Adam whose second moment is centred at the momentum:

    m ← β1 m + (1 - β1) g
    s ← β2 s + (1 - β2) (g - m)² + ε
    θ ← θ - η (m̂ / (√ŝ + ε) + λ θ)

There is no rectification, which the authors' package switches on from version 0.2. Two state tensors per parameter.
Defaults: Adam's, and ε = 1e-16 (the package's; the paper has 1e-8 for convolutional networks).
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, root


class AdaBelief(Rule):
    """AdaBelief with decoupled weight decay: the update of the module docstring."""

    elementwise = True
    buffers = ("momentum", "variance")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum, variance = bucket.state("momentum"), bucket.state("variance")
        average_(momentum, bucket.g, beta1)
        # Around the momentum that already contains g, as in Algorithm 2.
        average_square_(variance, torch._foreach_sub(bucket.g, momentum), beta2)
        # ε is part of the state, so it accumulates, and it is added once more below.
        torch._foreach_add_(variance, bucket["eps"])
        return torch._foreach_div(
            momentum, root(variance, 1 - beta2**bucket.t, bucket["eps"], scale=1 - beta1**bucket.t)
        )
