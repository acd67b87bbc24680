"""Trion: Modoranu et al. 2025, "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
arXiv:2505.17967, Algorithm 1. Dion (Ahn et al. 2025, arXiv:2504.05295) with columns of the cosine transform for a
basis. For a gradient G [m, n], m ≥ n (transposed otherwise), with the orthonormal DCT basis D:

    B = M + G,   Q = the r columns of D for which the columns of B D have the largest sums of absolute values
    P = B Q,   M ← B - (1 - μ) P Qᵀ                 what the step leaves out stays in M
    W ← W - η (√max(1, rows / columns) polar(P) Qᵀ + λ W)

polar is Muon's five steps. AdamW trains embeddings, stem, head, norms and biases. State: M, and D once per size.
Defaults: r = 128, μ = 0.95, η as Muon's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.low_rank import dct_basis, expand
from submissions.matrices import MatrixRule, MatrixSubmission, stack_state, to_tall
from submissions.polar import orthogonalise
from submissions.rule import Bucket


class Trion(MatrixSubmission):
    """Trion for hidden matrices and convolutions, with AdamW for the rest. rank: r. momentum: μ."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rank: PositiveInt = 128,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        rule: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rank": rank}
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: TrionRule(groups, rule), adamw)


class TrionRule(MatrixRule):
    """The update of the module docstring. State per matrix: M as `momentum`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(to_tall(theta)[0])}

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = to_tall(gradient)
        rows, columns = g.shape[1:]
        # One basis for all matrices with this number of columns.
        dct = self.shared(f"dct_{columns}", lambda: dct_basis(columns, g))
        momentum = stack_state(bucket, "momentum")
        transformed = momentum.add_(g) @ dct
        selected = transformed.abs().sum(1).topk(min(bucket["rank"], columns), dim=1).indices.sort(dim=1).values
        basis = dct[:, selected].movedim(1, 0)
        projected = transformed.gather(2, selected.unsqueeze(1).expand(-1, rows, -1))
        momentum.sub_(projected @ basis.mT, alpha=1 - bucket["momentum"])
        scale = math.sqrt(max(1.0, gradient.shape[1] / gradient.shape[2]))
        return expand(orthogonalise(projected), basis, transposed) * scale
