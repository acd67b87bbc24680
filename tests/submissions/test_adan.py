from __future__ import annotations

import pytorch_optimizer
import torch

from submissions.adan import Adan
from tests.submissions.parity import all_dtypes, both_decays, follows


@both_decays
@all_dtypes
def test_adan(decay: float, dtype: torch.dtype) -> None:
    follows(
        lambda p: Adan(p, lr=0.01, weight_decay=decay),
        lambda p: pytorch_optimizer.Adan(p, lr=0.01, betas=(0.98, 0.92, 0.99), weight_decay=decay),
        dtype,
    )
