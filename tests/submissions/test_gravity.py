from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.gravity import GravityRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def gravity(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = 1 / g.abs().max() if g.numel() else 1.0
    zeta = g / (1 + (g / m) ** 2)
    beta = (0.9 * t + 1) / (t + 2)
    v = memory["v"] = beta * memory.get("v", 0 * g) + (1 - beta) * zeta
    return theta - 0.05 * (v + decay * theta)


@both_decays
@all_dtypes
def test_gravity(decay: float, dtype: torch.dtype) -> None:
    generator = torch.Generator()
    assert_parity(
        lambda p: GravityRule(p, 0.05, 0.0, 0.9, decay, generator), transcription(gravity, decay=decay), dtype
    )


def test_the_first_velocity_is_random_of_deviation_alpha_over_lr() -> None:
    rule = GravityRule([torch.nn.Parameter(torch.zeros(1))], 0.05, 0.01, 0.9, 0.0, torch.Generator().manual_seed(0))
    velocity = rule.initial_state(torch.zeros(20_000), torch.zeros(20_000), {})["velocity"]
    assert abs(float(velocity.std()) - 0.2) < 0.01 and abs(float(velocity.mean())) < 0.01
