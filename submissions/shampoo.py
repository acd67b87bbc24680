"""Shampoo: Gupta, Koren & Singer 2018, arXiv:1802.09568, in the form of Shi et al. 2023, "A Distributed Data-Parallel
PyTorch Implementation of the Distributed Shampoo Optimizer", arXiv:2309.06497 (Algorithm 2 and section 3), with moving
averages, blocks, delayed roots, and Adam's step size by grafting. For each block with gradient G [m, n]:

    L ← β2 L + (1 - β2) G Gᵀ,   R ← β2 R + (1 - β2) Gᵀ G,   M ← β1 M + (1 - β1) G
    every f steps: L̄ = (L̂ + ε I)^(-1/4),   R̄ = (R̂ + ε I)^(-1/4)
    P = L̄ M̂ R̄,   W ← W - η (‖A‖/‖P‖ P + λ W)

where ^ is bias correction and A is Adam's direction from the same M and β2 (its ε: `grafting_eps`). For the first
`start_step` steps the direction is A itself. AdamW trains all parameters but hidden matrices and convolutions, with the
same η, β and λ. State per block: 2mn + 2m² + 2n² numbers.

Defaults: the paper's (section 4: β = (0.9, 0.999), ε = 1e-12, blocks of 1024, f = 50). The paper advises a start_step
large enough for the averages to become meaningful.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, eigendecomposition, stack_state, zero_square
from submissions.rule import Bucket, adam_direction


class Shampoo(MatrixSubmission):
    """Shampoo for hidden matrices and convolutions, with AdamW for the rest. precondition_frequency: f."""

    host_waits = "every f steps, for eigendecompositions"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        grafting_eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: PositiveInt = 50,
        start_step: NonNegativeInt = 50,
        block_size: PositiveInt = 1024,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        shampoo = {"eps": eps, "grafting_eps": grafting_eps, "precondition_frequency": precondition_frequency}
        shampoo |= {"start_step": start_step}
        adamw = adam | {"eps": grafting_eps}
        super().__init__(setup, lambda groups: ShampooRule(groups, adam | shampoo), adamw, block_size=block_size)


class ShampooRule(MatrixRule):
    """The update of the module docstring. State: L and R as `covariance_0` and `_1`, L̄ and R̄ as `root_0` and `_1`."""

    buffers = ("momentum", "second_moment")

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        squares = {f"{name}_{side}": zero_square(theta, side) for name in ("covariance", "root") for side in (0, 1)}
        return super().initial_state(theta, g, group) | squares

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta2, start = bucket["betas"][1], bucket["start_step"]
        m, v = stack_state(bucket, "momentum"), stack_state(bucket, "second_moment")
        (grafted,) = adam_direction([m], [v], [gradient], bucket["betas"], bucket["grafting_eps"], bucket.t)
        covariances = [stack_state(bucket, f"covariance_{side}") for side in (0, 1)]
        covariances[0].lerp_(gradient @ gradient.mT, 1 - beta2)
        covariances[1].lerp_(gradient.mT @ gradient, 1 - beta2)
        if bucket.t <= start:
            return grafted
        roots = [stack_state(bucket, f"root_{side}") for side in (0, 1)]
        if (bucket.t - start - 1) % bucket["precondition_frequency"] == 0:
            for root, covariance in zip(roots, covariances, strict=True):
                root.copy_(_inverse_fourth_root(covariance / (1 - beta2**bucket.t), bucket["eps"]))
        # Without the bias correction of M, which the grafting below cancels.
        preconditioned = roots[0] @ m @ roots[1]
        # The bound gives a zero direction where the momentum is zero.
        scale = torch.linalg.matrix_norm(grafted) / torch.linalg.matrix_norm(preconditioned).clamp_min(1e-30)
        return preconditioned * scale[:, None, None]


def _inverse_fourth_root(covariance: Tensor, eps: float) -> Tensor:
    """(C + ε I)^(-1/4) of symmetric matrices C [n, d, d]."""
    values, vectors = eigendecomposition(covariance)
    # Rounding makes the smallest eigenvalues of a singular C negative; a shift lifts them to 0.
    roots = (values - values[:, -1:].clamp_max(0) + eps) ** -0.25
    return (vectors * roots.unsqueeze(1)) @ vectors.mT
