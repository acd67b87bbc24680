from __future__ import annotations

from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from submissions.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from tests.submissions.parity import all_dtypes, assert_parity, both_decays


def training(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


@both_decays
@all_dtypes
def test_sgd(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ScheduleFreeSGD(p, lr=0.1, weight_decay=decay),
        lambda p: training(schedulefree.SGDScheduleFree(p, lr=0.1, momentum=0.9, weight_decay=decay, foreach=False)),
        dtype,
    )


@both_decays
@all_dtypes
def test_adamw(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ScheduleFreeAdamW(p, lr=0.01, weight_decay=decay),
        lambda p: training(schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=decay, foreach=False)),
        dtype,
    )


def test_evaluation_weights_are_the_average_of_the_fast_sequence() -> None:
    """With constant learning rates x is the mean of z over the steps."""
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = ScheduleFreeSGD([p], lr=0.1)
    fast = []
    for _ in range(7):
        p.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        fast.append(optimizer.state[p]["fast"].clone())
    y = p.detach().clone()
    optimizer.eval()
    assert torch.allclose(p.detach(), torch.stack(fast).mean(0), rtol=1e-12)
    optimizer.train()
    assert torch.allclose(p.detach(), y, rtol=1e-12)


def test_no_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=0"):
        ScheduleFreeSGD([nn.Parameter(torch.ones(1))], momentum=0.0)
