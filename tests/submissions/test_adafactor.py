from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.adafactor import Adafactor
from tests.submissions.parity import SHAPES, all_dtypes, assert_parity, both_decays, transcription


@both_decays
@all_dtypes
def test_adafactor(decay: float, dtype: torch.dtype) -> None:
    """Without convolutions, of which torch factors the last two dimensions. torch multiplies the decay by η instead of
    ρ, which are equal here."""
    assert_parity(
        lambda p: Adafactor(p, lr=0.01, weight_decay=decay),
        lambda p: torch.optim.Adafactor(p, lr=0.01, eps=(1e-30, 1e-3), weight_decay=decay),
        dtype,
        shapes=[shape for shape in SHAPES if len(shape) < 3 and 0 not in shape],
    )


def adafactor(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    """With sums as in Algorithm 4, on [2, 3, 3, 3] as a matrix of 2 by 27; ρ is 1 / √t after t = 4."""
    if theta.numel() == 0:
        return theta
    beta = 1 - t**-0.8
    square = (g**2 + 1e-30).reshape(2, 27)
    r = memory["r"] = beta * memory.get("r", torch.zeros(2)) + (1 - beta) * square.sum(1)
    c = memory["c"] = beta * memory.get("c", torch.zeros(27)) + (1 - beta) * square.sum(0)
    v = torch.outer(r, c) / r.sum()
    u = g / v.sqrt().reshape(g.shape)
    u = u / max(1.0, float(u.pow(2).mean().sqrt()))
    return theta - min(0.5, t**-0.5) * max(1e-3, float(theta.pow(2).mean().sqrt())) * u


@all_dtypes
def test_convolutions_are_matrices_and_empty_parameters_do_no_harm(dtype: torch.dtype) -> None:
    assert_parity(lambda p: Adafactor(p, lr=0.5), transcription(adafactor), dtype, shapes=[(2, 3, 3, 3), (0,), (0, 3)])
