from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.adopt import Adopt
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def adopt(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2, whose steps count from 0; the step 0 only sets v."""
    step = t - 1
    if step == 0:
        memory["v"], memory["m"] = g**2, torch.zeros_like(g)
        return theta
    normalised = g / memory["v"].sqrt().clamp(min=1e-6)
    memory["m"] = 0.9 * memory["m"] + 0.1 * normalised.clamp(-(step**0.25), step**0.25)
    memory["v"] = 0.99 * memory["v"] + 0.01 * g**2
    return theta - 0.01 * decay * theta - 0.01 * memory["m"]


@both_decays
@all_dtypes
def test_adopt(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: Adopt(p, lr=0.01, betas=(0.9, 0.99), weight_decay=decay), transcription(adopt, decay=decay), dtype
    )
