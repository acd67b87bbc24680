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
    else:
        gradient = c.sgn()
    return theta + 0.01 * (gradient - decay * theta)


@pytest.mark.parametrize("kernel", ["l1", "l2", "huber"])
@both_decays
@all_dtypes
def test_lion_k(kernel: str, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: LionK(p, lr=0.01, betas=(0.9, 0.97), weight_decay=decay, kernel=kernel, width=0.02),
        transcription(lion_k, kernel=kernel, decay=decay),
        dtype,
    )


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel=l3: must be one of l1, l2, huber"):
        LionK([torch.nn.Parameter(torch.ones(2))], kernel="l3")
