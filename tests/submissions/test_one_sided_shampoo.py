from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.one_sided_shampoo import OneSidedShampooRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def one_sided(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, grafting: bool) -> Tensor:
    """On the left of a wide matrix; of a tall one, that of its transpose."""
    if len(G) > len(G.T):
        return one_sided(W.T, G.T, t, memory, decay, grafting).T
    M = memory["M"] = 0.9 * memory.get("M", 0) + 0.1 * G
    V = memory["V"] = 0.8 * memory.get("V", 0) + 0.2 * G**2
    L = memory["L"] = 0.8 * memory.get("L", 0) + 0.2 * G @ G.T
    if (t - 1) % 2 == 0:
        values, vectors = torch.linalg.eigh(L)
        memory["root"] = vectors @ torch.diag(values**-0.5) @ vectors.T
    P = memory["root"] @ M
    if grafting:
        adam = M / (1 - 0.9**t) / ((V / (1 - 0.8**t)).sqrt() + 1e-15)
        P = P * adam.norm() / P.norm()
    return W - 0.01 * (P + decay * W)


@both_decays
@all_dtypes
@pytest.mark.parametrize("grafting", [False, True])
def test_one_sided_shampoo(grafting: bool, decay: float, dtype: torch.dtype) -> None:
    options = {"lr": 0.01, "betas": (0.9, 0.8), "weight_decay": decay, "precondition_frequency": 2}
    reference = transcription(one_sided, decay=decay, grafting=grafting)
    assert_parity(
        lambda p: OneSidedShampooRule(p, options | {"grafting": grafting}), reference, dtype,
        shapes=((4, 6), (6, 4), (5, 7)), tolerance=1e-7,
    )  # fmt: skip


def test_directions_that_no_gradient_has_are_left_alone() -> None:
    """A gradient of rank one: the pseudo-inverse has nothing to say of the other directions."""
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    rule = OneSidedShampooRule(
        [weight], {"lr": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.0, "precondition_frequency": 1, "grafting": False}
    )
    weight.grad = torch.outer(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0]))
    rule.step()
    torch.testing.assert_close(weight.detach(), -weight.grad / 10)
