from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from submissions.ademamix import AdEMAMixRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def ademamix(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 1 and its schedulers, with T = 15."""
    alpha = min(t / 15 * 5, 5)
    share = min(t / 15, 1)
    halving = (1 - share) * math.log(0.5) / math.log(0.9) + share * math.log(0.5) / math.log(0.9999)  # half-life
    beta3 = min(0.5 ** (1 / halving), 0.9999)
    m1 = memory["m1"] = 0.9 * memory.get("m1", 0 * g) + 0.1 * g
    m2 = memory["m2"] = beta3 * memory.get("m2", 0 * g) + (1 - beta3) * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    step = (m1 / (1 - 0.9**t) + alpha * m2) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return theta - 0.01 * (step + decay * theta)


@both_decays
@all_dtypes
def test_ademamix(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: AdEMAMixRule(p, 0.01, (0.9, 0.999, 0.9999), 5.0, 1e-8, decay, 15),
        transcription(ademamix, decay=decay),
        dtype,
    )
