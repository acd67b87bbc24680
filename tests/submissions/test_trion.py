from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from submissions.trion import TrionRule
from tests.submissions.parity import assert_parity, both_decays, transcription

RANK = 2


def trion(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """In the tall orientation; D by its definition."""
    scale = max(1.0, len(W) / len(W.T)) ** 0.5
    tall = len(W) >= len(W.T)
    G = G if tall else G.T
    n = G.shape[1]
    D = torch.tensor(
        [[(1 if j == 0 else 2**0.5) / n**0.5 * math.cos(math.pi * (i + 0.5) * j / n) for j in range(n)]
         for i in range(n)], dtype=G.dtype,
    )  # fmt: skip
    B = memory.get("M", 0) + G
    sums = (B @ D).abs().sum(0)
    Q = D[:, sorted(sorted(range(n), key=lambda j: -float(sums[j]))[:RANK])]
    P = B @ Q
    memory["M"] = B - 0.1 * P @ Q.T
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    x = S / S.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    step = U @ torch.diag(x) @ Vh @ Q.T
    return W - 0.01 * (scale * (step if tall else step.T) + decay * W)


@both_decays
def test_trion(decay: float) -> None:
    """In float64, where Muon's steps are computed as they are."""
    options = {"lr": 0.01, "momentum": 0.9, "rank": RANK, "weight_decay": decay}
    assert_parity(
        lambda p: TrionRule(p, options), transcription(trion, decay=decay), torch.float64,
        shapes=((6, 4), (4, 6), (6, 4), (5, 5)), tolerance=1e-7,
    )  # fmt: skip
