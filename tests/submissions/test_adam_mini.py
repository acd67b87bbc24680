from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Role
from submissions.adam_mini import AdamMini, AdamMiniRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, make_setup, transcription

LR, BETAS = 0.01, (0.9, 0.95)


def adam_mini(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], by_row: bool, decay: float) -> Tensor:
    """Algorithm 1, block by block."""
    if not theta.numel():
        return theta
    rows = g.reshape(len(g), -1) if by_row and g.ndim else g.reshape(1, -1)
    updates = []
    for i, block in enumerate(rows):
        m, v = memory.get(i, (0.0, 0.0))
        memory[i] = m, v = BETAS[0] * m + (1 - BETAS[0]) * block, BETAS[1] * v + (1 - BETAS[1]) * (block**2).mean()
        updates.append(m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)) ** 0.5 + 1e-8))
    return theta - LR * decay * theta - LR * torch.stack(updates).view(g.shape)


@both_decays
@all_dtypes
@pytest.mark.parametrize("by_row", [False, True])
def test_adam_mini(by_row: bool, decay: float, dtype: torch.dtype) -> None:
    hyperparameters = {"lr": LR, "betas": BETAS, "eps": 1e-8, "weight_decay": decay}

    def ours(p: Any) -> AdamMiniRule:
        return AdamMiniRule([{"params": p, "by_row": by_row}], hyperparameters)

    assert_parity(ours, transcription(adam_mini, by_row=by_row, decay=decay), dtype)


def test_matrices_have_a_number_per_row_and_vectors_one() -> None:
    named = {"matrix": nn.Parameter(torch.ones(4, 3)), "norm": nn.Parameter(torch.ones(3))}
    submission = AdamMini(
        make_setup(named, {"matrix": Role.HIDDEN_MATRIX, "norm": Role.NORM}, no_decay=[Role.NORM], needs=AdamMini.needs)
    )
    (rule,) = submission.optimizers
    for p in named.values():
        p.grad = torch.ones_like(p)
    rule.step()
    assert [rule.state[p]["block_moment"].numel() for p in named.values()] == [4, 1]
    assert [group["weight_decay"] for group in rule.param_groups] == [0.1, 0.0]
