"""COSMOS: Liu et al. 2025, "COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs",
arXiv:2502.17410, Algorithm 1. SOAP on the leading eigenvectors of the gradients' covariance, Muon on the rest. For a
gradient G [m, n], m ≥ n (transposed otherwise), with U [n, r] orthonormal and S [r, r]:

    M ← β1 M + (1 - β1) G
    U⁺ = QR(β2 U S + (1 - β2) Gᵀ G U),   S ← U⁺ᵀ (β2 U S Uᵀ + (1 - β2) Gᵀ G) U⁺
    V ← β2 V + (1 - β2) (G U⁺)²
    A = [M̂ U⁺ / √((V + ε) / (1 - β2^t))] U⁺ᵀ
    B = norm(polar(M - M U⁺ U⁺ᵀ))
    W ← W - η (norm(A + γ √m B) + λ W),    norm(X) = √n X / ‖X‖

polar is Muon's five steps. U starts at the leading right singular vectors of the first gradient. The length of a step
does not depend on the gradient's; √n makes it that of a polar factor. AdamW trains embeddings, head, norms and biases.
State per matrix: mn + mr + nr + r² numbers. Defaults: β = (0.95, 0.95), r = 64, γ = 0.1, ε = 1e-8.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.polar import orthogonalise
from submissions.rule import Bucket

TINY = 1e-30


class Cosmos(MatrixSubmission):
    """COSMOS for hidden matrices and convolutions, with AdamW for the rest. rank: r. muon_share: γ."""

    host_waits = "at its first step, for singular vectors"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: PositiveInt = 64,
        muon_share: NonNegativeFloat = 0.1,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        rule: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        rule |= {"rank": rank, "muon_share": muon_share}
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": eps, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: CosmosRule(groups, rule), adamw)


class CosmosRule(MatrixRule):
    """The update of the module docstring. State per matrix: M, V, U as `basis` and S as `covariance`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        tall = to_tall(theta)[0]
        rank = min(group["rank"], tall.shape[1])
        return {
            "momentum": torch.zeros_like(tall), "second_moment": theta.new_zeros(len(tall), rank),
            "basis": theta.new_zeros(tall.shape[1], rank), "covariance": theta.new_zeros(rank, rank),
        }  # fmt: skip

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        (beta1, beta2), t = bucket["betas"], bucket.t
        g, transposed = to_tall(gradient)
        m, v = stack_state(bucket, "momentum"), stack_state(bucket, "second_moment")
        basis, s = stack_state(bucket, "basis"), stack_state(bucket, "covariance")
        m.lerp_(g, 1 - beta1)
        if t == 1:
            basis.copy_(leading_right_singular_vectors(g, basis.shape[2]))
        new_basis = torch.linalg.qr(beta2 * (basis @ s) + (1 - beta2) * (g.mT @ (g @ basis))).Q
        projected, change = g @ new_basis, new_basis.mT @ basis
        s.copy_(beta2 * (change @ s @ change.mT) + (1 - beta2) * (projected.mT @ projected))
        basis.copy_(new_basis)
        v.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        within = m @ basis
        denominator = ((v + bucket["eps"]) / (1 - beta2**t)).sqrt()
        adapted = (within / (1 - beta1**t) / denominator) @ basis.mT
        rest = _unit_length(orthogonalise(m - within @ basis.mT))
        combined = _unit_length(adapted + bucket["muon_share"] * g.shape[1] ** 0.5 * rest)
        return combined.mT if transposed else combined


def _unit_length(matrix: Tensor) -> Tensor:
    """√n X / ‖X‖ for matrices [count, m, n]; zero stays zero."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(TINY)
    return matrix * (matrix.shape[2] ** 0.5 / norm)
