from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.adamw_normalized import AdamWNormalized
from tests.submissions.parity import assert_parity, both_decays, submission_optimizer, transcription


def adamw(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], normalised: float) -> Tensor:
    """Algorithm 2 with s = 1; the setup of the parity tests has a budget of ten steps."""
    alpha, decay = 0.01, normalised * (1 / 10) ** 0.5
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    v = memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g**2
    return theta - (alpha * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + decay * theta)


@both_decays
def test_adamw_normalized(decay: float) -> None:
    for dtype in (torch.float64, torch.float32):
        assert_parity(
            submission_optimizer(
                AdamWNormalized, needs=AdamWNormalized.needs, lr=0.01, betas=(0.9, 0.99), weight_decay=decay
            ),
            transcription(adamw, normalised=decay), dtype,
        )  # fmt: skip
