from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.lion_k import LionK
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def lion_k(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], kernel: str, decay: float) -> Tensor:
    """Eq. 3 with the paper's sign of the momentum, -m."""
    m = memory.get("m", torch.zeros_like(theta))
    c = 0.9 * m - 0.1 * g
    memory["m"] = 0.97 * m - 0.03 * g
    if kernel == "l2":
        gradient = c / c.pow(2).sum().sqrt() if theta.numel() else c
    elif kernel == "huber":
        gradient = torch.where(c.abs() < 0.02, c / 0.02, c.sgn())
    elif kernel == "lp":
        norm = c.abs().pow(3).sum() ** (1 / 3)
        gradient = c.sgn() * c.abs() ** 2 / norm**2 if theta.numel() else c
    elif kernel == "rows":
        flat = c.reshape(len(c), -1) if c.ndim > 2 else c
        gradient = (flat / flat.pow(2).sum(-1, keepdim=c.ndim > 1).sqrt()).view_as(c) if theta.numel() else c
        if c.ndim == 0:
            gradient = c.sgn()
    elif kernel == "nuclear" and c.ndim > 1:
        U, S, Vh = torch.linalg.svd(c.flatten(1), full_matrices=False)
        x = S / S.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        gradient = (U @ torch.diag(x) @ Vh).view_as(c)
    elif kernel == "nuclear":
        gradient = c / c.pow(2).sum().sqrt() if theta.numel() else c
    else:
        gradient = c.sgn()
    return theta + 0.01 * (gradient - decay * theta)


@pytest.mark.parametrize("kernel", ["l1", "l2", "lp", "rows", "huber"])
@both_decays
@all_dtypes
def test_lion_k(kernel: str, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: LionK(p, lr=0.01, betas=(0.9, 0.97), weight_decay=decay, kernel=kernel, width=0.02, power=3.0),
        transcription(lion_k, kernel=kernel, decay=decay),
        dtype,
    )


@both_decays
def test_the_nuclear_kernel_maps_singular_values(decay: float) -> None:
    """In float64, where the steps are computed as they are."""
    assert_parity(
        lambda p: LionK(p, lr=0.01, betas=(0.9, 0.97), weight_decay=decay, kernel="nuclear"),
        transcription(lion_k, kernel="nuclear", decay=decay),
        torch.float64,
        tolerance=1e-7,
    )


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel=l3: must be one of l1, l2, lp, rows, nuclear, huber"):
        LionK([torch.nn.Parameter(torch.ones(2))], kernel="l3")
