from __future__ import annotations

import pytorch_optimizer
import torch

from submissions.accelerated_sgd import AcceleratedSGD
from tests.submissions.parity import all_dtypes, assert_parity, both_decays


@both_decays
@all_dtypes
def test_accelerated_sgd(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: AcceleratedSGD(p, lr=0.05, long_step=100.0, advantage=5.0, weight_decay=decay),
        lambda p: pytorch_optimizer.AccSGD(p, lr=0.05, kappa=100.0, xi=5.0, weight_decay=decay),
        dtype,
    )
