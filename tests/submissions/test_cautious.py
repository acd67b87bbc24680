from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.cautious import CautiousAdamW, CautiousLion
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def masked(u: Tensor, g: Tensor) -> Tensor:
    """The paper's scaling; pytorch_optimizer follows the code's instead."""
    phi = torch.where(u * g > 0, torch.ones_like(u), torch.zeros_like(u))
    return u * phi * (u.numel() / (phi.sum() + 1))


def cautious_adamw(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return theta - 0.01 * decay * theta - 0.01 * masked(step, g)


def cautious_lion(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = memory.get("m", 0 * g)
    memory["m"] = 0.99 * m + 0.01 * g
    return theta - 0.01 * decay * theta - 0.01 * masked((0.9 * m + 0.1 * g).sign(), g)


@both_decays
@all_dtypes
def test_cautious_adamw(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: CautiousAdamW(p, lr=0.01, weight_decay=decay), transcription(cautious_adamw, decay=decay), dtype
    )


@both_decays
@all_dtypes
def test_cautious_lion(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: CautiousLion(p, lr=0.01, weight_decay=decay), transcription(cautious_lion, decay=decay), dtype
    )
