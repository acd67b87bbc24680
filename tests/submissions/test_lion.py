from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.lion import Lion
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def lion(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2."""
    m = memory.get("m", torch.zeros_like(theta))
    c = 0.9 * m + 0.1 * g
    memory["m"] = 0.97 * m + 0.03 * g
    return theta - 0.01 * (torch.sign(c) + decay * theta)


@both_decays
@all_dtypes
def test_lion(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: Lion(p, lr=0.01, betas=(0.9, 0.97), weight_decay=decay), transcription(lion, decay=decay), dtype
    )
