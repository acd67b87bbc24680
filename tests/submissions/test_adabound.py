from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.adabound import AdaBound
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def adabound(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, amsbound: bool) -> Tensor:
    """Algorithm 2 with the code's bias correction and without the paper's division by √t."""
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    if amsbound:
        v = memory["max"] = torch.maximum(memory.get("max", 0 * g), v)
    rate = 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) / (v.sqrt() + 1e-8)
    low, high = 0.05 * (1 - 1 / (0.01 * t + 1)), 0.05 * (1 + 1 / (0.01 * t))
    return theta - 0.01 * decay * theta - rate.clip(low, high) * m


@pytest.mark.parametrize("amsbound", [False, True])
@both_decays
@all_dtypes
def test_adabound(amsbound: bool, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: AdaBound(p, lr=0.01, final_lr=0.05, gamma=0.01, weight_decay=decay, amsbound=amsbound),
        transcription(adabound, decay=decay, amsbound=amsbound),
        dtype,
    )
