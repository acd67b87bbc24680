"""AdamW with Subset-Norm and Subspace-Momentum: Nguyen & Nguyen 2024, "Efficient Adaptive Optimization via Subset-Norm
and Subspace-Momentum: Fast, Memory-Reduced Training with Convergence Guarantees", arXiv:2411.07120, Algorithms 1 and 3.
One second moment for each subset S of a matrix's gradient G [m, n]. The subsets extend along the shorter side: the rows
of a tall matrix, the columns of a wide one:

    v_S ← β2 v_S + (1 - β2) ‖G_S‖²,   W ← (1 - η λ) W - η √(1 - β2^t) / (1 - β1^t) U / (√v + ε)

Subset-Norm alone (rank = 0): U = M ← β1 M + (1 - β1) G. With Subspace-Momentum the momentum is kept in the space of the
r leading singular vectors Q of G. They are recomputed every T steps, which resets the momentum; the part of G outside
that space is used without momentum:

    M ← β1 M + (1 - β1) G Q,   U = M Qᵀ + (G - G Q Qᵀ)

A norm over d entries is √d times their size, so learning rates are larger than Adam's. AdamW trains embeddings, head,
norms and biases. State per matrix: max(m, n) numbers, and mn or r (m + n). Defaults: the authors' code (η = 1e-3,
β = (0.9, 0.999), ε = 1e-6, T = 200).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.rule import Bucket


class AdamWSubsetNorm(MatrixSubmission):
    """Subset-Norm for hidden matrices and convolutions, with AdamW for the rest.

    rank: r of Subspace-Momentum; 0 is Subset-Norm alone. refresh_every: T.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: NonNegativeInt = 0,
        refresh_every: PositiveInt = 200,
        adamw_lr: float = 1e-3,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        subset_norm: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        subset_norm |= {"rank": rank, "refresh_every": refresh_every}
        adamw = {"lr": adamw_lr, "betas": betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: SubsetNormRule(groups, subset_norm), adamw)


class SubsetNormRule(MatrixRule):
    """The update of the module docstring. State: v as `subset_moment`, `momentum`, and Q as `basis`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        matrix, transposed = to_tall(theta)
        rows, columns = matrix.shape
        # In a shape that broadcasts to the matrix as it is, not transposed.
        state = {"subset_moment": theta.new_zeros((1, rows) if transposed else (rows, 1))}
        if group["rank"] == 0:
            return state | {"momentum": torch.zeros_like(theta)}
        rank = min(group["rank"], columns)
        return state | {"basis": theta.new_zeros(columns, rank), "momentum": theta.new_zeros(rows, rank)}

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta1, beta2 = bucket["betas"]
        g, transposed = to_tall(gradient)
        v, m = stack_state(bucket, "subset_moment"), stack_state(bucket, "momentum")
        norms = torch.linalg.vector_norm(gradient, dim=1 if transposed else 2, keepdim=True)
        v.lerp_(norms.square_(), 1 - beta2)
        if bucket["rank"] == 0:
            update = m.lerp_(gradient, 1 - beta1)
        else:
            basis = stack_state(bucket, "basis")
            if (bucket.t - 1) % bucket["refresh_every"] == 0:
                basis.copy_(leading_right_singular_vectors(g, basis.shape[2]))
                m.zero_()
            projected = g @ basis
            m.lerp_(projected, 1 - beta1)
            # G + (M - G Q) Qᵀ is U with one product fewer.
            difference = m - projected
            update = gradient + (basis @ difference.mT if transposed else difference @ basis.mT)
        correction = (1 - beta2**bucket.t) ** 0.5 / (1 - beta1**bucket.t)
        return update * (correction / (v.sqrt() + bucket["eps"]))
