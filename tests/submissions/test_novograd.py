from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.novograd import NovoGrad
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def novograd(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 1."""
    square = (g * g).sum()
    memory["v"] = square if t == 1 else 0.98 * memory["v"] + 0.02 * square
    normalised = g / (memory["v"].sqrt() + 1e-8) + decay * theta
    memory["m"] = normalised if t == 1 else 0.95 * memory["m"] + normalised
    return theta - 0.01 * memory["m"]


@both_decays
@all_dtypes
def test_novograd(decay: float, dtype: torch.dtype) -> None:
    assert_parity(lambda p: NovoGrad(p, lr=0.01, weight_decay=decay), transcription(novograd, decay=decay), dtype)
