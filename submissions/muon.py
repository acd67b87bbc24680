"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The momentum of each hidden matrix is replaced
by the nearest semi-orthogonal matrix (Newton-Schulz), and everything else is trained by AdamW:

    m ← β m + (1 - β) g
    u = β m + (1 - β) g with Nesterov's momentum, else m
    θ ← (1 - η λ) θ - η s O,   O ≈ U Vᵀ where u = U S Vᵀ

By the post's rule it serves hidden matrices and convolutions, whose filters [out, in, h, w] count as matrices
[out, in·h·w]; embeddings, stem, head, norms and biases go to AdamW. `adjust_lr_fn`: "original" scales by
s = √max(1.0, rows / columns), "match_rms_adamw" by 0.2 √max(rows, columns) (Liu et al. 2025, arXiv:2502.16982).
State: m. `torch.optim.Muon` is the same up to rounding, but takes small matrices too one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from harness.submission import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, by_shape, orthogonalised, stacked
from submissions.rule import Slice, Tensors

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Muon(MatrixSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: PositiveInt = 5,
        adjust_lr_fn: str = "original",
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        if adjust_lr_fn not in SCALES:
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn}: must be one of {', '.join(SCALES)}")
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: MuonRule(groups, own), adamw)


class MuonRule(MatrixRule):
    buffers = ("momentum",)

    def batch_direction(self, at: Slice, gradient: Tensor) -> Tensor:
        momentum = stacked(at, "momentum").lerp_(gradient, 1 - at["momentum"])
        update = gradient.lerp(momentum, at["momentum"]) if at["nesterov"] else momentum
        return orthogonalised(update, at["ns_steps"])

    def apply(self, at: Slice, direction: Tensors) -> None:
        torch._foreach_mul_(at.theta, 1 - at["lr"] * at["weight_decay"])
        for places in by_shape(at.theta):
            rate = at["lr"] * SCALES[at["adjust_lr_fn"]](*at.theta[places[0]].shape[:2])
            torch._foreach_add_([at.theta[k] for k in places], [direction[k] for k in places], alpha=-rate)
