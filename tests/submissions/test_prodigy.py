from __future__ import annotations

import pytest
import torch
from prodigyopt import Prodigy as Published

from submissions.prodigy import Prodigy
from tests.submissions.parity import assert_parity, backward, both_decays, make_parameters


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prodigy(decay: float, dtype: torch.dtype) -> None:
    """The package multiplies ε by the next d, the paper by the present one: no difference in the first six digits."""
    assert_parity(
        lambda p: Prodigy(p, weight_decay=decay, initial_d=1e-3),
        lambda p: Published(p, weight_decay=decay, d0=1e-3),
        dtype,
        tolerance=1e-6,
    )


def test_d_grows_in_bfloat16_as_in_float32() -> None:
    """d depends on sums over all steps, so the runs cannot be compared step by step."""
    grown = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = make_parameters(dtype)
        optimizer = Prodigy(parameters, initial_d=1e-2)
        for step in range(25):
            backward(parameters, step)
            optimizer.step()
        grown.append(optimizer.param_groups[0]["d"])
    assert grown[1] == pytest.approx(grown[0], rel=0.05) and grown[0] > 0.05
