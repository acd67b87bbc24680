from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.diffgrad import DiffGrad
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def diffgrad(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    friction = 1 / (1 + torch.exp(-(memory.get("g", 0 * g) - g).abs()))
    memory["g"] = g
    step = friction * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return theta - 0.01 * (step + decay * theta)


@both_decays
@all_dtypes
def test_diffgrad(decay: float, dtype: torch.dtype) -> None:
    assert_parity(lambda p: DiffGrad(p, lr=0.01, weight_decay=decay), transcription(diffgrad, decay=decay), dtype)
