from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.splus import SPlusRule
from tests.submissions.parity import assert_parity, both_decays, transcription


def splus(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, every: int) -> Tensor:
    M = memory["M"] = 0.9 * memory.get("M", 0) + 0.1 * G
    QL, QR = (
        memory.setdefault(name, torch.eye(n, dtype=G.dtype)) for name, n in zip(("QL", "QR"), G.shape, strict=True)
    )
    for side, product in (("L", G @ G.T), ("R", G.T @ G)):
        memory[side] = 0.8 * memory.get(side, 0) + 0.2 * product
        if t == 1 or t % every == 0:
            memory["Q" + side] = torch.linalg.eigh(memory[side]).eigenvectors
    # The order and the signs of the eigenvectors do not matter.
    U = QL @ torch.sign(QL.T @ M @ QR) @ QR.T
    return W - 0.01 * (2 / sum(W.shape) * U + decay * W)


@both_decays
@pytest.mark.parametrize("every", [3, 7])
def test_splus(decay: float, every: int) -> None:
    """In float64 alone: the sign of what is nearly zero is rounding's in others."""
    options = {"lr": 0.01, "betas": (0.9, 0.8), "weight_decay": decay, "precondition_frequency": every}
    assert_parity(
        lambda p: SPlusRule(p, options), transcription(splus, decay=decay, every=every), torch.float64,
        shapes=((5, 5), (3, 3)), tolerance=1e-7,
    )  # fmt: skip
