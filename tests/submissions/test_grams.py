from __future__ import annotations

import pytorch_optimizer
import torch

from submissions.grams import Grams
from tests.submissions.parity import all_dtypes, assert_parity, both_decays


@both_decays
@all_dtypes
def test_grams(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: Grams(p, lr=0.01, weight_decay=decay),
        lambda p: pytorch_optimizer.Grams(p, lr=0.01, eps=1e-6, weight_decay=decay, weight_decouple=True),
        dtype,
    )
