"""AdamW with Subset-Norm and Subspace-Momentum: Nguyen & Nguyen 2024, "Efficient Adaptive Optimization via Subset-Norm
and Subspace-Momentum: Fast, Memory-Reduced Training with Convergence Guarantees", arXiv:2411.07120, Algorithms 1 and 3.
One second moment for each subset S of a matrix's gradient G [m, n], which is its whole shorter side (each row of a tall
matrix, each column of a wide one):

    v_S ← β2 v_S + (1 - β2) ‖G_S‖²,   W ← (1 - η λ) W - η √(1 - β2^t) / (1 - β1^t) U / (√v + ε)

Subset-Norm alone (rank = 0): U = M ← β1 M + (1 - β1) G. With Subspace-Momentum, the momentum lives in the r leading
singular directions Q of G, taken anew every T steps with the momentum reset, and the rest of G passes without any:

    M ← β1 M + (1 - β1) G Q,   U = M Qᵀ + (G - G Q Qᵀ)

A norm over d entries is √d times their size, so learning rates are larger than Adam's. Embeddings, head, norms and
biases are trained by AdamW. State per matrix: max(m, n) numbers, and mn or r (m + n). Defaults: the authors' code
(η = 1e-3, β = (0.9, 0.999), ε = 1e-6, T = 200).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.submission import Setup
from submissions.list_rule import Group
from submissions.matrices import MatrixRule, MatrixSubmission, as_tall, leading_right_vectors, zeros_of


class AdamWSubsetNorm(MatrixSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 0,
        refresh_every: int = 200,
        adamw_lr: float = 1e-3,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank={rank}: must be at least 0, and 0 keeps the whole momentum")
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every}: must be at least 1")
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"rank": rank, "refresh_every": refresh_every}
        adamw = {"lr": adamw_lr, "betas": betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: SubsetNormRule(groups, own), adamw)


class SubsetNormRule(MatrixRule):
    def direction(self, parameters: list[Tensor], gradient: Tensor, group: Group) -> Tensor:
        (beta1, beta2), step = group["betas"], group["step"]
        tall, transposed = as_tall(gradient)
        _, rows, columns = tall.shape
        v = self.stacked(parameters, "subset_sq", zeros_of(rows, 1))
        v.lerp_(tall.square().sum(2, keepdim=True), 1 - beta2)
        if group["rank"] == 0:
            moved = self.stacked(parameters, "exp_avg", zeros_of(rows, columns)).lerp_(tall, 1 - beta1)
        else:
            rank = min(group["rank"], columns)
            basis = self.stacked(parameters, "basis", zeros_of(columns, rank))
            m = self.stacked(parameters, "exp_avg", zeros_of(rows, rank))
            if (step - 1) % group["refresh_every"] == 0:
                basis.copy_(leading_right_vectors(tall, rank))
                m.zero_()
            projected = tall @ basis
            m.lerp_(projected, 1 - beta1)
            moved = tall + (m - projected) @ basis.mT
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        update = correction * moved / (v.sqrt() + group["eps"])
        return update.mT if transposed else update
