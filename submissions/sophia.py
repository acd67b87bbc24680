"""Sophia: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
arXiv:2305.14342, Algorithm 3. Momentum m divided by a moving average h of estimates ĥ of the Hessian's diagonal, and
clipped elementwise:

    m ← β1 m + (1 - β1) g
    every k steps: h ← β2 h + (1 - β2) ĥ
    θ ← θ - η λ θ,   θ ← θ - η clip(m / max(γ h, ε), 1)

Sophia-G (Algorithm 2, Gauss-Newton-Bartlett): ĥ = B ĝ ⊙ ĝ, where ĝ is the gradient of the mean loss over B labels drawn
from the model's own predictions; in language modelling B counts tokens. Sophia-H (Algorithm 1, Hutchinson):
ĥ = u ⊙ H u with u ~ N(0, I), from a Hessian-vector product. The estimate uses the whole batch of the step; the paper
uses a part of it to save time. State: m and h. Defaults (sections 2.3 and 3.1): k = 10; G: β = (0.965, 0.99), γ = 0.05;
H: β = (0.96, 0.99), γ = 0.01; ε = 1e-12, λ = 0.2, η about 0.8 times AdamW's for GPT-2 small.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, average_


class SophiaRule(Rule):
    """The update of the module docstring. State: m as `momentum`, h as `hessian`."""

    elementwise = True
    buffers = ("momentum", "hessian")
    estimates: dict[Tensor, Tensor] | None = None
    """ĥ by parameter. Set it before a step that updates h, and to None after it."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, hyperparameters | {"updates": 0})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        for group in self.param_groups:
            group["updates"] += 1

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        (beta1, beta2), momentum, hessian = bucket["betas"], bucket.state("momentum"), bucket.state("hessian")
        average_(momentum, bucket.g, beta1)
        if self.estimates is not None:
            average_(hessian, bucket.look_up(self.estimates), beta2)
        # Hutchinson's estimates may be negative; the bound makes the step there a sign step.
        denominator = torch._foreach_mul(hessian, bucket["gamma"])
        torch._foreach_clamp_min_(denominator, bucket["eps"])
        ratio = torch._foreach_div(momentum, denominator)
        torch._foreach_clamp_min_(ratio, -1.0)
        torch._foreach_clamp_max_(ratio, 1.0)
        return ratio


class _SophiaSubmission(OptimizerSubmission):
    """Sophia with any estimator. A subclass defines `estimate_diagonal`."""

    def __init__(
        self,
        setup: Setup,
        lr: float,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        weight_decay: float,
        estimate_every: int,
    ) -> None:
        self.estimate_every = estimate_every
        hyperparameters = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        self.rule = SophiaRule(setup.decay_groups(), hyperparameters)
        super().__init__(setup, [self.rule])

    @abstractmethod
    def estimate_diagonal(self, ctx: StepContext) -> list[Tensor]:
        """ĥ, an estimate of the Hessian's diagonal at the present parameters, as a list parallel to them."""

    @override
    def step(self, ctx: StepContext) -> None:
        self._gradient(ctx)
        # The rule counts the steps, since its parameter groups are part of the checkpoint.
        if self.rule.param_groups[0]["updates"] % self.estimate_every == 0:
            self.rule.estimates = dict(zip(self.setup.parameters, self.estimate_diagonal(ctx), strict=True))
        self.update(ctx)
        self.rule.estimates = None


class SophiaG(_SophiaSubmission):
    """Sophia-G, with the Gauss-Newton-Bartlett estimator. estimate_every: k."""

    needs = frozenset({Need.SAMPLED_LABELS, Need.RE_EVALUATE})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: PositiveFloat = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        estimate_every: PositiveInt = 10,
    ) -> None:
        super().__init__(setup, lr, betas, gamma, eps, weight_decay, estimate_every)

    @override
    def estimate_diagonal(self, ctx: StepContext) -> list[Tensor]:
        gradients = ctx.gradients(labels="sampled")
        # The gradient is a mean over B labels, so its square is B times too small.
        squares = torch._foreach_mul(gradients, gradients)
        return list(torch._foreach_mul(squares, float(ctx.label_count)))


class SophiaH(_SophiaSubmission):
    """Sophia-H, with Hutchinson's estimator. estimate_every: k."""

    needs = frozenset({Need.SECOND_DERIVATIVES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: PositiveFloat = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        estimate_every: PositiveInt = 10,
    ) -> None:
        super().__init__(setup, lr, betas, gamma, eps, weight_decay, estimate_every)

    @override
    def estimate_diagonal(self, ctx: StepContext) -> list[Tensor]:
        generator = self.setup.device_generator
        u = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in self.setup.parameters]
        return list(torch._foreach_mul(u, ctx.hessian_vector_product(u)))
