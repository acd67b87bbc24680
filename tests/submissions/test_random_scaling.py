from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.random_scaling import RandomScalingRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def random_scaling(
    theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, scales: list[float]
) -> Tensor:
    delta = memory["delta"] = 0.95 * (memory.get("delta", 0 * g) - 0.05 * g)
    return theta + scales[t - 1] * delta - 0.05 * decay * theta


@both_decays
@all_dtypes
def test_random_scaling(decay: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    scales = [float(torch.empty(()).exponential_(generator=generator)) for _ in range(25)]
    assert_parity(
        lambda p: RandomScalingRule(p, 0.05, 0.95, decay, torch.Generator().manual_seed(3)),
        transcription(random_scaling, decay=decay, scales=scales),
        dtype,
    )


def test_the_scale_is_exponential_of_mean_one() -> None:
    rule = RandomScalingRule([torch.nn.Parameter(torch.ones(1))], 0.1, 0.9, 0.0, torch.Generator().manual_seed(0))
    drawn = []
    for _ in range(3000):
        rule.prepare_step([])
        drawn.append(rule.scale)
    scales = torch.tensor(drawn)
    assert float(scales.mean()) == pytest.approx(1, abs=0.06) and float(scales.var()) == pytest.approx(1, abs=0.2)
