"""SPlus: Frans, Levine & Abbeel 2025, "A Stable Whitening Optimizer for Efficient Neural Network Training",
arXiv:2506.07254. The sign of the momentum in Shampoo's eigenbasis. For a matrix with gradient G [m, n]:

    M ← β1 M + (1 - β1) G,   L ← β2 L + (1 - β2) G Gᵀ,   R ← β2 R + (1 - β2) Gᵀ G
    W ← W - η (2 / (m + n) Q_L sign(Q_Lᵀ M Q_R) Q_Rᵀ + λ W)
    after the first step and every f steps: Q_L, Q_R ← the eigenvectors of L, R (at first the identity)

An average of the weights is evaluated: configs/optimizer/splus.yaml wraps the rule in one. AdamW trains all parameters
but hidden matrices and convolutions; the paper has the sign of the momentum for them. State per matrix: mn + 2m² + 2n²
numbers. Defaults: the authors' code (η = 0.2, β = (0.9, 0.999), λ = 0.01, f = 100).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, eigendecomposition, stack_state, zero_square
from submissions.rule import Bucket
from submissions.soap import rotate
from submissions.spectral_slots import average_covariance_


class SPlus(MatrixSubmission):
    """SPlus for hidden matrices and convolutions, with AdamW for the rest. precondition_frequency: f."""

    host_waits = "every f steps, for eigendecompositions"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        precondition_frequency: PositiveInt = 100,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: float = 0.01,
    ) -> None:
        rule: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        rule["precondition_frequency"] = precondition_frequency
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: SPlusRule(groups, rule), adamw)


class SPlusRule(MatrixRule):
    """The update of the module docstring. State: L, R as `covariance_0` and `_1`, Q_L, Q_R as `basis_0` and `_1`."""

    buffers = ("momentum",)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        squares = {f"covariance_{side}": zero_square(theta, side) for side in (0, 1)}
        squares |= {f"basis_{side}": torch.eye(theta.shape[side]).to(theta) for side in (0, 1)}
        return super().initial_state(theta, g, group) | squares

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta1, beta2 = bucket["betas"]
        momentum = stack_state(bucket, "momentum").lerp_(gradient, 1 - beta1)
        bases = {side: stack_state(bucket, f"basis_{side}") for side in (0, 1)}
        direction = rotate(rotate(momentum, bases).sign_(), bases, inverse=True) * (2 / sum(gradient.shape[1:]))
        for side, basis in bases.items():
            covariance = stack_state(bucket, f"covariance_{side}")
            average_covariance_(covariance, gradient, side, beta2)
            if bucket.t == 1 or bucket.t % bucket["precondition_frequency"] == 0:
                basis.copy_(eigendecomposition(covariance)[1])
        return direction
