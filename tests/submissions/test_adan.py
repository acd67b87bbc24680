from __future__ import annotations

import pytorch_optimizer
import torch

from submissions.adan import Adan
from tests.submissions.parity import all_dtypes, assert_parity, both_decays


@both_decays
@all_dtypes
def test_adan(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: Adan(p, lr=0.01, weight_decay=decay),
        lambda p: pytorch_optimizer.Adan(p, lr=0.01, betas=(0.98, 0.92, 0.99), weight_decay=decay),
        dtype,
    )
