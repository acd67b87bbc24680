"""AdaBound and AMSBound: Luo et al. 2019, "Adaptive Gradient Methods with Dynamic Bound of Learning Rate",
arXiv:1902.09843, Algorithm 2. Adam whose learning rate per coordinate is clipped between bounds that close in on SGD's:

    θ ← θ - clip(η √(1 - β2^t) / (1 - β1^t) / (√v + ε), low, high) m
    low = η* (1 - 1 / (γ t + 1))      high = η* (1 + 1 / (γ t))

η* is `final_lr`; the schedule scales it together with η. AMSBound uses the largest v so far. As in the authors' code
there is a bias correction, and no division by √t. Two state tensors per parameter, AMSBound three. Defaults (paper and
code): Adam's, η* = 0.1, γ = 1e-3. The paper has no weight decay; here it is decoupled.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, root


class AdaBound(Rule):
    """AdaBound, or AMSBound with amsbound=true: the update of the module docstring.

    final_lr: η*. gamma: γ, the speed at which the bounds converge.
    """

    elementwise = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        final_lr: float = 0.1,
        gamma: PositiveFloat = 1e-3,
        amsbound: bool = False,
    ) -> None:
        # An attribute of the instance, because it depends on a hyperparameter.
        self.buffers = ("momentum", "second_moment", *(["largest"] if amsbound else []))  # type: ignore[misc]
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "final_lr": final_lr}
        super().__init__(params, hyperparameters | {"gamma": gamma, "amsbound": amsbound})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum, second_moment = bucket.state("momentum"), bucket.state("second_moment")
        average_(momentum, bucket.g, beta1)
        average_square_(second_moment, bucket.g, beta2)
        if bucket["amsbound"]:
            torch._foreach_maximum_(bucket.state("largest"), second_moment)
            second_moment = bucket.state("largest")
        # All rates are relative to η, by which `apply` multiplies. Nothing divides by the scheduled η: it may be zero.
        final = bucket["final_lr"] / self.defaults["lr"]
        rates = torch._foreach_reciprocal(root(second_moment, 1.0, bucket["eps"]))
        torch._foreach_mul_(rates, (1 - beta2**bucket.t) ** 0.5 / (1 - beta1**bucket.t))
        torch._foreach_clamp_min_(rates, final * (1 - 1 / (bucket["gamma"] * bucket.t + 1)))
        torch._foreach_clamp_max_(rates, final * (1 + 1 / (bucket["gamma"] * bucket.t)))
        torch._foreach_mul_(rates, momentum)
        return rates
