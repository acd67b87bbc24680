from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.sgdw import SGDW
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def sgdw(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, s: float = 1.0) -> Tensor:
    """Algorithm 1; pytorch_optimizer multiplies the decay by the learning rate too."""
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + s * 0.05 * g
    return theta - m - s * decay * theta


@both_decays
@all_dtypes
def test_sgdw(decay: float, dtype: torch.dtype) -> None:
    assert_parity(lambda p: SGDW(p, lr=0.05, weight_decay=decay), transcription(sgdw, decay=decay), dtype)


def test_the_schedule_scales_both_and_the_learning_rate_only_one() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = SGDW([parameter], lr=0.05, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.5 * 0.05
    parameter.grad = torch.ones(1)
    optimizer.step()
    expected = sgdw(torch.ones(1), torch.ones(1), 1, {}, decay=0.1, s=0.5)
    assert torch.allclose(parameter.detach(), expected)
