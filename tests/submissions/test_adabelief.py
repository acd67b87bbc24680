from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.adabelief import AdaBelief
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def adabelief(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2, whose ε accumulates in s; libraries add it in the same place."""
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    s = memory["s"] = 0.999 * memory.get("s", 0 * g) + 0.001 * (g - m) ** 2 + 1e-10
    step = (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-10)
    return theta - 0.01 * decay * theta - 0.01 * step


@both_decays
@all_dtypes
def test_adabelief(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: AdaBelief(p, lr=0.01, eps=1e-10, weight_decay=decay), transcription(adabelief, decay=decay), dtype
    )
