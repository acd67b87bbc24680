"""SWATS: Keskar & Socher 2017, "Improving Generalization Performance by Switching from Adam to SGD", arXiv:1712.07628,
Algorithm 1. Adam until γ, the learning rate at which SGD would make Adam's step, converges; from then on SGD with that
learning rate. Over all parameters together, with Adam's step -η u:

    γ = η (u · u) / (u · g)
    Λ ← β2 Λ + (1 - β2) γ                         switch once |Λ̂ - γ| < tolerance, Λ̂ > 0 and t > 1
    v ← β1 v + g,  θ ← θ - (1 - β1) Λ̂ v           after the switch, with Λ̂ = Λ / (1 - β2^t) at the switch

The schedule scales Λ̂ together with η. The host decides when to switch, and until then waits for the device once a step.
Two state tensors per parameter (v replaces the momentum). Defaults (paper): Adam's, tolerance 1e-9. The paper has no
weight decay; here it is decoupled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, adam


class Swats(Rule):
    """SWATS: the update of the module docstring."""

    buffers = ("momentum", "second_moment")
    host_waits = "each step until the switch"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        tolerance: PositiveFloat = 1e-9,
    ) -> None:
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "tolerance": tolerance}
        # `rate` is Λ / η, which a schedule does not change; `sgd_rate` is Λ̂ / η after the switch.
        super().__init__(params, hyperparameters | {"rate": 0.0, "updates": 0, "sgd_rate": None})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        # All groups hold the same averages.
        shared = self.param_groups[0]
        if shared["sgd_rate"] is not None or not buckets:
            return
        for bucket in buckets:
            bucket.scratch["adam"] = adam(bucket)
        pairs = [(u, g) for bucket in buckets for u, g in zip(bucket.scratch["adam"], bucket.g, strict=True)]
        # The one wait for the device in a step.
        u_squared, u_times_g = torch.stack(
            [
                torch.stack([u.square().sum() for u, _ in pairs]).sum(),
                torch.stack([(u * g).sum() for u, g in pairs]).sum(),
            ]
        ).tolist()
        if u_times_g == 0:
            return
        gamma, beta2, updates = u_squared / u_times_g, shared["betas"][1], shared["updates"] + 1
        rate = beta2 * shared["rate"] + (1 - beta2) * gamma
        corrected = rate / (1 - beta2**updates)
        switch = updates > 1 and corrected > 0 and shared["lr"] * abs(corrected - gamma) < shared["tolerance"]
        for group in self.param_groups:
            group |= {"rate": rate, "updates": updates, "sgd_rate": corrected if switch else None}
        # This step is still Adam's; v starts at zero after it.
        if switch:
            for bucket in buckets:
                torch._foreach_zero_(bucket.state("momentum"))

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        if "adam" in bucket.scratch:
            adam_direction: Tensors = bucket.scratch["adam"]
            return adam_direction
        velocity = bucket.state("momentum")
        torch._foreach_mul_(velocity, bucket["betas"][0])
        torch._foreach_add_(velocity, bucket.g)
        return torch._foreach_mul(velocity, (1 - bucket["betas"][0]) * bucket["sgd_rate"])
