"""AdaHessian: Yao et al. 2021, "AdaHessian: An Adaptive Second Order Optimizer for Machine Learning", AAAI 2021,
arXiv:2006.00719, Algorithms 1 and 2. Adam with Hutchinson's estimate of the Hessian's diagonal in place of the gradient
in the second moment:

    d = |z ⊙ H z|, z of random signs; for filters the mean of d over each kernel h × w
    m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) d²
    θ ← θ - η (m̂ / (√v̂ ^ k + ε) + λ θ)

Every `estimate_every` steps v has a new d. The paper estimates at every step and averages vectors over blocks as well;
the authors' code does not. State: m and v. Defaults (code): η = 0.15, β = (0.9, 0.999), ε = 1e-4, k = 1.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, average_, average_square_


class AdaHessian(OptimizerSubmission):
    """AdaHessian as in the module docstring. hessian_power: k. estimate_every: steps from one d to the next."""

    needs = frozenset({Need.SECOND_DERIVATIVES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        estimate_every: PositiveInt = 1,
    ) -> None:
        self.estimate_every, self.count = estimate_every, 0
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.rule = AdaHessianRule(setup.decay_groups(), hyperparameters | {"hessian_power": hessian_power})
        super().__init__(setup, [self.rule])

    @override
    def step(self, ctx: StepContext) -> None:
        self._gradient(ctx)
        if self.count % self.estimate_every == 0:
            self.rule.estimates = dict(zip(self.setup.parameters, self._estimate_diagonal(ctx), strict=True))
        self.count += 1
        self.update(ctx)
        self.rule.estimates = None

    def _estimate_diagonal(self, ctx: StepContext) -> list[Tensor]:
        """d, parallel to the parameters."""
        generator = self.setup.device_generator
        z = [
            torch.randint(2, p.shape, generator=generator, device=p.device).to(p.dtype).mul_(2).sub_(1)
            for p in self.setup.parameters
        ]
        return [average_kernels(d.abs()) for d in torch._foreach_mul(z, ctx.hessian_vector_product(z))]

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


class AdaHessianRule(Rule):
    """The update of the module docstring. State: m as `momentum`, v as `second_moment`, and the number of its terms."""

    buffers = ("momentum", "second_moment")
    estimates: dict[Tensor, Tensor] | None = None
    """d by parameter. Set it before a step that updates v, and to None after it."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, hyperparameters)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"estimates": 0}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        (beta1, beta2), momentum, second_moment = (
            bucket["betas"],
            bucket.state("momentum"),
            bucket.state("second_moment"),
        )
        average_(momentum, bucket.g, beta1)
        if self.estimates is not None:
            average_square_(second_moment, bucket.look_up(self.estimates), beta2)
            for state in bucket.states:
                state["estimates"] += 1
        counts = [state["estimates"] for state in bucket.states]
        corrected = torch._foreach_div(second_moment, [1 - beta2**count if count else 1.0 for count in counts])
        torch._foreach_pow_(corrected, bucket["hessian_power"] / 2)
        torch._foreach_add_(corrected, bucket["eps"])
        torch._foreach_mul_(corrected, 1 - beta1**bucket.t)
        return torch._foreach_div(momentum, corrected)


def average_kernels(estimate: Tensor) -> Tensor:
    """For filters [out, in, h, w] the mean over h and w in place of each value; other tensors as they are."""
    return estimate.mean((2, 3), keepdim=True).expand_as(estimate) if estimate.ndim == 4 else estimate
