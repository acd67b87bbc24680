"""One-sided Shampoo: ASGO, An et al. 2025, "ASGO: Adaptive Structured Gradient Optimization", arXiv:2503.20762, and Xie
et al. 2025, "Structured Preconditioners in Adaptive Optimization: A Unified Analysis", arXiv:2503.10537. Shampoo's
factor of the shorter side alone, with the square root in place of the fourth. For a gradient G [m, n] with m ≤ n (else
on the right):

    M ← β1 M + (1 - β1) G,   L ← β2 L + (1 - β2) G Gᵀ
    every f steps: L̄ = L^(-1/2), as a pseudo-inverse
    P = L̄ M,   W ← W - η (‖A‖/‖P‖ P + λ W)

A is Adam's direction from the same M and β2 with ε = 1e-15, whose length the step borrows (modded-nanogpt track 3,
result 35); with `grafting=false` it is P. AdamW trains all parameters but hidden matrices and convolutions, with the
same η, β and λ. State per matrix: mn + 2 min(m, n)² numbers, and mn more with grafting. Defaults: that result's
(β = (0.9, 0.9), f = 1), with η and λ of AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, eigendecomposition, stack_state, zero_square
from submissions.rule import Bucket, adam_direction
from submissions.spectral_slots import TINY, average_covariance_, keep_norm

ADAM_EPS = 1e-15


class OneSidedShampoo(MatrixSubmission):
    """One-sided Shampoo for hidden matrices and convolutions, with AdamW for the rest. precondition_frequency: f."""

    host_waits = "every f steps, for eigendecompositions"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.9),
        weight_decay: float = 0.1,
        precondition_frequency: PositiveInt = 1,
        grafting: bool = True,
    ) -> None:
        rule: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "grafting": grafting}
        rule["precondition_frequency"] = precondition_frequency
        adamw = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(setup, lambda groups: OneSidedShampooRule(groups, rule), adamw)


class OneSidedShampooRule(MatrixRule):
    """The update of the module docstring. State: L as `covariance`, L̄ as `root`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        side = int(theta.shape[0] > theta.shape[1])
        state = {"covariance": zero_square(theta, side), "root": zero_square(theta, side)}
        state["momentum"] = torch.zeros_like(theta)
        return state | ({"second_moment": torch.zeros_like(theta)} if group["grafting"] else {})

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        side = int(gradient.shape[1] > gradient.shape[2])
        momentum = stack_state(bucket, "momentum")
        if bucket["grafting"]:
            v = stack_state(bucket, "second_moment")
            (grafted,) = adam_direction([momentum], [v], [gradient], bucket["betas"], ADAM_EPS, bucket.t)
        else:
            momentum.lerp_(gradient, 1 - bucket["betas"][0])
        covariance, root = stack_state(bucket, "covariance"), stack_state(bucket, "root")
        average_covariance_(covariance, gradient, side, bucket["betas"][1])
        if (bucket.t - 1) % bucket["precondition_frequency"] == 0:
            values, vectors = eigendecomposition(covariance)
            # The gradients have no part in directions whose eigenvalue is only rounding.
            present = values > values[:, :1] * torch.finfo(values.dtype).eps * values.shape[1]
            powers = torch.where(present, values.clamp_min(TINY) ** -0.5, 0.0)
            root.copy_((vectors * powers.unsqueeze(1)) @ vectors.mT)
        preconditioned = root @ momentum if side == 0 else momentum @ root
        return keep_norm(preconditioned, grafted) if bucket["grafting"] else preconditioned
