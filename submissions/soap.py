"""SOAP: Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, Algorithm 3. Adam in
the eigenbasis of Shampoo's preconditioner; the basis is refreshed every f steps. For a matrix with gradient G [m, n]:

    G' = Q_Lᵀ G Q_R,   M ← β1 M + (1 - β1) G,   V ← β2 V + (1 - β2) G'²
    W ← W - η Q_L [Q_Lᵀ M Q_R / (√V + ε)] Q_Rᵀ - η λ W      (M and V bias-corrected)
    L ← β2 L + (1 - β2) G Gᵀ,   R ← β2 R + (1 - β2) Gᵀ G
    every f steps: Q_L ← QR(L Q_L),   Q_R ← QR(R Q_R)         (one step of power iteration, Algorithm 4)

As in the authors' code, the first gradient only initialises the bases (eigenvectors of L and R), a refresh first sorts
the basis by its estimated eigenvalues, and a side longer than `max_precondition_dim` keeps Q = I. M is stored as
Q_Lᵀ M Q_R, which saves a rotation per step. State per matrix: 2mn + 2m² + 2n² numbers. Defaults: the authors' code (lr
3e-3, β = (0.95, 0.95), λ = 0.01, f = 10). AdamW trains all parameters but hidden matrices and convolutions, with the
same hyperparameters.
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


class SOAP(MatrixSubmission):
    """SOAP for hidden matrices and convolutions, with AdamW for the rest. precondition_frequency: f."""

    host_waits = "at its first step, for an eigendecomposition"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: PositiveInt = 10,
        max_precondition_dim: PositiveInt = 10_000,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        soap = {"precondition_frequency": precondition_frequency, "max_precondition_dim": max_precondition_dim}
        super().__init__(setup, lambda groups: SOAPRule(groups, adam | soap), adam)


class SOAPRule(MatrixRule):
    """The update of the module docstring. State: L, R as `covariance_0` and `_1`, Q_L, Q_R as `basis_0` and `_1`."""

    buffers = ("momentum", "second_moment")

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        squares = {
            f"{name}_{side}": zero_square(theta, side)
            for side in (0, 1) if theta.shape[side] <= group["max_precondition_dim"]
            for name in ("covariance", "basis")
        }  # fmt: skip
        return super().initial_state(theta, g, group) | squares

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        (beta1, beta2), t = bucket["betas"], bucket.t - 1
        m, v = stack_state(bucket, "momentum"), stack_state(bucket, "second_moment")
        sides = [side for side in (0, 1) if f"basis_{side}" in bucket.states[0]]
        bases = {side: stack_state(bucket, f"basis_{side}") for side in sides}
        covariances = {side: stack_state(bucket, f"covariance_{side}") for side in sides}
        for side, covariance in covariances.items():
            covariance.lerp_(gradient @ gradient.mT if side == 0 else gradient.mT @ gradient, 1 - beta2)
        # The first gradient moves nothing, so Adam's steps count from the second one.
        if t == 0:
            for side, basis in bases.items():
                basis.copy_(eigendecomposition(covariances[side])[1])
            return torch.zeros_like(gradient)
        rotated = rotate(gradient, bases)
        m.lerp_(rotated, 1 - beta1)
        v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        denominator = (v / (1 - beta2**t)).sqrt_().add_(bucket["eps"]).mul_(1 - beta1**t)
        direction = rotate(m / denominator, bases, inverse=True)
        if t % bucket["precondition_frequency"] == 0:
            # The momentum is rotated out of the old basis and into the new one; v is only permuted.
            momentum = rotate(m, bases, inverse=True)
            for side, basis in bases.items():
                refresh_basis(basis, covariances[side], v, side)
            m.copy_(rotate(momentum, bases))
        return direction


def rotate(matrix: Tensor, bases: dict[int, Tensor], inverse: bool = False) -> Tensor:
    """Q_Lᵀ G Q_R for G = matrix [n, rows, columns], or Q_L G Q_Rᵀ if `inverse`. bases: by side; Q = I if missing."""
    if 0 in bases:
        matrix = (bases[0] if inverse else bases[0].mT) @ matrix
    if 1 in bases:
        matrix = matrix @ (bases[1].mT if inverse else bases[1])
    return matrix


def refresh_basis(basis: Tensor, covariance: Tensor, v: Tensor, side: int) -> None:
    """One step of power iteration on the basis of one side, sorted by its eigenvalues; in place.

    v is permuted together with the directions that its rows (side 0) or columns (side 1) belong to.
    """
    product = covariance @ basis
    # diag(Qᵀ C Q) estimates the eigenvalues. A stable sort keeps the order of equal ones, for the same bits everywhere.
    order = (basis * product).sum(1).argsort(dim=1, descending=True, stable=True)
    v.copy_(v.take_along_dim(order.unsqueeze(2 - side), 1 + side))
    basis.copy_(torch.linalg.qr(product.take_along_dim(order.unsqueeze(1), 2)).Q)
