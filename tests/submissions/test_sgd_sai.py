from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer import SGDSaI as LibrarySGDSaI
from torch import Tensor

from submissions.sgd_sai import SGDSaI
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

LR = 0.3


def sgd_sai(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    if t == 1:
        memory["s"] = float(g.norm()) / (float(g.std()) + 1e-8 if g.ndim > 1 and len(g) > 1 else 1.0)
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    return theta - LR * decay * theta - LR * memory["s"] * memory["m"]


@both_decays
@all_dtypes
def test_sgd_sai(decay: float, dtype: torch.dtype) -> None:
    assert_parity(lambda p: SGDSaI(p, lr=LR, weight_decay=decay), transcription(sgd_sai, decay=decay), dtype)


@both_decays
def test_sgd_sai_is_the_librarys(decay: float) -> None:
    assert_parity(
        lambda p: SGDSaI(p, lr=LR, weight_decay=decay), lambda p: LibrarySGDSaI(p, lr=LR, weight_decay=decay),
        torch.float32, shapes=((4, 6), (5,), (2, 3, 3, 3)),
    )  # fmt: skip
