"""AdEMAMix: Pagliardini, Ablin & Grangier 2024, "The AdEMAMix Optimizer: Better, Faster, Older", arXiv:2409.03137,
Algorithm 1. AdamW with a second, much slower momentum beside the first:

    m₁ ← β1 m₁ + (1 - β1) g
    m₂ ← β3(t) m₂ + (1 - β3(t)) g
    v ← β2 v + (1 - β2) g²
    θ ← θ - η ((m̂₁ + α(t) m₂) / (√v̂ + ε) + λ θ)

m₂ is not bias-corrected. Over the first T steps α(t) grows linearly to α, and β3(t) grows from β1 to β3 so that its
half-life grows linearly. T is the budget unless `warmup_steps` is given. Three state tensors per parameter. Defaults
(paper): β = (0.9, 0.999, 0.9999), α = 5 (8 for language models), ε = 1e-8.
"""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup
from submissions.rule import Bucket, Rule, Tensors, average_, average_square_, root


class AdEMAMix(OptimizerSubmission):
    """AdEMAMix as in the module docstring. betas: (β1, β2, β3). warmup_steps: T (default: the budget)."""

    needs = frozenset({Need.TOTAL_STEPS})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: NonNegativeFloat = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: PositiveInt | None = None,
    ) -> None:
        steps = setup.total_steps if warmup_steps is None else warmup_steps
        super().__init__(setup, [AdEMAMixRule(setup.decay_groups(), lr, betas, alpha, eps, weight_decay, steps)])


class AdEMAMixRule(Rule):
    """The update of the module docstring, with T in `warmup_steps`."""

    elementwise = True
    buffers = ("momentum", "slow_momentum", "second_moment")

    def __init__(
        self, params: ParamsT, lr: float, betas: tuple[float, float, float], alpha: float, eps: float,
        weight_decay: float, warmup_steps: int,
    ) -> None:  # fmt: skip
        hyperparameters = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyperparameters | {"warmup_steps": warmup_steps})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2, beta3 = bucket["betas"]
        progress = min(1.0, bucket.t / bucket["warmup_steps"])
        # The half-life of a decay rate β is proportional to -1 / log β, so 1 / log β3(t) is linear in t.
        log_beta1, log_beta3 = math.log(beta1), math.log(beta3)
        beta3_now = math.exp(log_beta1 * log_beta3 / ((1 - progress) * log_beta3 + progress * log_beta1))
        fast, slow, second_moment = (bucket.state(name) for name in self.buffers)
        average_(fast, bucket.g, beta1)
        average_(slow, bucket.g, beta3_now)
        average_square_(second_moment, bucket.g, beta2)
        # `root` divides by the correction of the fast momentum, which the slow one must not get.
        correction = 1 - beta1**bucket.t
        direction = torch._foreach_add(fast, slow, alpha=correction * bucket["alpha"] * progress)
        torch._foreach_div_(direction, root(second_moment, 1 - beta2**bucket.t, bucket["eps"], scale=correction))
        return direction
