"""LDAdam: Robert, Safaryan, Modoranu & Alistarh 2025, "LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics", ICLR 2025, arXiv:2410.16103, Algorithm 1. Adam in a subspace that follows the momentum by one step of power
iteration each step; the moments are carried into the new subspace, and what is left out is fed back. For a gradient
G [m, n], m ≥ n (transposed otherwise), with P [n, r] orthonormal, moments m, v [m, r] and their bias-corrected m̂, v̂:

    A = G + E,   B = ρ m̂ Pᵀ + (1 - ρ) A,   P⁺ = QR(Bᵀ B P),   Q = Pᵀ P⁺,   g = A P⁺
    m̃ = m Q,   ṽ = (1 - β2^(t-1)) |(v̂ - m̂²) Q² + (m̂ Q)²|                       (Q² elementwise)
    m⁺ = β1 m̃ + (1 - β1) g,   v⁺ = β2 ṽ + (1 - β2) g²
    E⁺ = A - g P⁺ᵀ + β1/(1 - β1) (m Pᵀ - m̃ P⁺ᵀ)
    W ← W - η (m̂⁺ / (√v̂⁺ + ε) P⁺ᵀ + λ W)

P starts at the leading right singular vectors of the first gradient, and is used as it is in the first step. AdamW
trains embeddings, head, norms and biases. State per matrix: nr + 2mr numbers, and mn for E. Defaults: the authors' code
(ρ = 0.908, β = (0.908, 0.99), ε = 1e-8); r = 256 in the paper.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.low_rank import expand, zero_moments
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.rule import Bucket


class LDAdam(MatrixSubmission):
    """LDAdam for hidden matrices and convolutions. rank: r. rho: ρ."""

    host_waits = "at its first step, for singular vectors"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: PositiveInt = 256,
        rho: Annotated[float, Interval(ge=0, le=1)] = 0.908,
        error_feedback: bool = True,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        ldadam = {"rank": rank, "rho": rho, "error_feedback": error_feedback}
        super().__init__(setup, lambda groups: LDAdamRule(groups, adam | ldadam), adam)


class LDAdamRule(MatrixRule):
    """The update of the module docstring. State per matrix: P as `basis`, m, v [m, r] and E as `error`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = to_tall(theta)[0].shape
        rank = min(group["rank"], columns)
        state = {"basis": theta.new_zeros(columns, rank)} | zero_moments(theta, rows, rank)
        return state | ({"error": theta.new_zeros(rows, columns)} if group["error_feedback"] else {})

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        (beta1, beta2), t = bucket["betas"], bucket.t
        g, transposed = to_tall(gradient)
        basis, m, v = (stack_state(bucket, name) for name in ("basis", "momentum", "second_moment"))
        accumulated = g + stack_state(bucket, "error") if bucket["error_feedback"] else g
        if t == 1:
            new_basis = leading_right_singular_vectors(accumulated, basis.shape[2])
            carried, second = m.clone(), v.clone()
        else:
            mean = m / (1 - beta1 ** (t - 1))
            mixed = bucket["rho"] * (mean @ basis.mT) + (1 - bucket["rho"]) * accumulated
            new_basis = torch.linalg.qr(mixed.mT @ (mixed @ basis)).Q
            change = basis.mT @ new_basis
            carried = m @ change
            correction = 1 - beta2 ** (t - 1)
            variance = (v / correction - mean.square()) @ change.square()
            second = correction * (variance + (mean @ change).square()).abs()
        projected = accumulated @ new_basis
        if bucket["error_feedback"]:
            lost_momentum = m @ basis.mT - carried @ new_basis.mT
            error = accumulated - projected @ new_basis.mT + beta1 / (1 - beta1) * lost_momentum
            stack_state(bucket, "error").copy_(error)
        basis.copy_(new_basis)
        m.copy_(carried.lerp(projected, 1 - beta1))
        v.copy_(second.lerp(projected.square(), 1 - beta2))
        direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + bucket["eps"])
        return expand(direction, basis, transposed)
