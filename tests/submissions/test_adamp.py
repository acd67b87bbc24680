from __future__ import annotations

from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submissions.adamp import SGDP, AdamP
from tests.submissions.parity import SHAPES, all_dtypes, assert_parity, both_decays, transcription


@both_decays
@all_dtypes
def test_adamp(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: AdamP(p, lr=0.01, weight_decay=decay, delta=0.5),
        lambda p: pytorch_optimizer.AdamP(p, lr=0.01, weight_decay=decay, delta=0.5, weight_decouple=True),
        dtype,
        # The library fails on an empty tensor, and adds ε to √v before the bias correction.
        shapes=SHAPES[:-1],
        tolerance=1e-6,
    )


@both_decays
@all_dtypes
def test_sgdp(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: SGDP(p, lr=0.01, weight_decay=decay, delta=0.5),
        transcription(sgdp, decay=decay),
        dtype,
    )


def sgdp(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 1 with Nesterov momentum, channels tried first, and weight decay divided by 1 - momentum as in the
    code."""
    v = memory["v"] = 0.9 * memory.get("v", 0 * g) + g
    p, ratio = g + 0.9 * v, 1.0
    if theta.ndim > 1:
        for size in (theta[0].numel(), theta.numel()):
            w, u, q = (x.reshape(-1, size) for x in (theta, g, p))
            if F.cosine_similarity(w, u, dim=1).abs().max() < 0.5 / size**0.5:
                unit = w / w.norm(dim=1, keepdim=True)
                p, ratio = (q - unit * (unit * q).sum(1, keepdim=True)).reshape(theta.shape), 0.1
                break
    return theta - 0.01 * decay * ratio / (1 - 0.9) * theta - 0.01 * p


def test_the_length_of_scale_invariant_weights_does_not_grow_by_momentum() -> None:
    def final_norm(make: Any) -> float:
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(8, 16))
        optimizer = make([w])
        for _ in range(50):
            w.grad = None
            x = torch.randn(32, 16)
            F.mse_loss(F.normalize(w, dim=1) @ x.T, torch.randn(8, 32)).backward()
            optimizer.step()
        return float(w.detach().norm())

    plain = final_norm(lambda p: torch.optim.SGD(p, lr=5.0, momentum=0.9, nesterov=True))
    projected = final_norm(lambda p: SGDP(p, lr=5.0))
    assert projected < 0.9 * plain
