from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.lamb import Lamb
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def lamb(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2; pytorch_optimizer clips the norm of the weights at 10, the paper's φ is the identity."""
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + decay * theta
    ratio = theta.norm() / u.norm() if theta.numel() else 1.0
    return theta - 0.01 * ratio * u


@both_decays
@all_dtypes
def test_lamb(decay: float, dtype: torch.dtype) -> None:
    assert_parity(lambda p: Lamb(p, lr=0.01, weight_decay=decay), transcription(lamb, decay=decay), dtype)
