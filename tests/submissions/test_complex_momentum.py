from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.complex_momentum import ComplexMomentum
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription


def complex_momentum(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """In complex numbers."""
    beta = torch.polar(torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    memory["mu"] = beta * memory.get("mu", 0 * g) - g
    return theta + 0.05 * memory["mu"].real - 0.05 * decay * theta


@both_decays
@all_dtypes
def test_complex_momentum(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ComplexMomentum(p, lr=0.05, angle=0.7, weight_decay=decay),
        transcription(complex_momentum, decay=decay),
        dtype,
    )


@all_dtypes
def test_no_angle_is_momentum(dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ComplexMomentum(p, lr=0.05, angle=0.0), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), dtype
    )
