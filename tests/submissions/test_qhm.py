"""QHM and normalised SGD against transcriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from submissions.normalized_sgd import NormalizedSGD
from submissions.qhm import QHM
from tests.submissions.parity import (
    STEPS,
    all_dtypes,
    assert_parity,
    backward,
    both_decays,
    make_parameters,
    transcription,
)


def qhm(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
    return theta - 0.1 * (0.3 * g + 0.7 * m + decay * theta)


@both_decays
@all_dtypes
def test_qhm(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: QHM(p, lr=0.1, momentum=0.8, nu=0.7, weight_decay=decay), transcription(qhm, decay=decay), dtype
    )


def normalized(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
    return theta - 0.1 * (m / m.norm() + decay * theta) if theta.numel() else theta


@both_decays
@all_dtypes
def test_normalized_sgd_per_tensor(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: NormalizedSGD(p, lr=0.1, momentum=0.8, weight_decay=decay, per_tensor=True),
        transcription(normalized, decay=decay), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
def test_the_norm_is_over_all_parameters_of_all_groups(groups: int) -> None:
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    rule = NormalizedSGD([{"params": ours[k::groups]} for k in range(groups)], lr=0.1, momentum=0.8)
    m = [torch.zeros_like(p) for p in theirs]
    for step in range(STEPS):
        backward(ours, step)
        backward(theirs, step)
        rule.step()
        gradients: list[Any] = [p.grad for p in theirs]
        m = [0.8 * a + 0.2 * g for a, g in zip(m, gradients, strict=True)]
        norm = torch.cat([a.flatten() for a in m]).norm()
        for p, a in zip(theirs, m, strict=True):
            p.data = p.data - 0.1 * a / norm
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])


def test_a_gradient_of_zero_moves_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    NormalizedSGD([p]).step()
    assert torch.equal(p, torch.ones(3))
