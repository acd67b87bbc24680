from __future__ import annotations

from typing import Any

import dog
import pytest
import torch

from submissions.dog import DoG, LDoG
from tests.submissions.parity import assert_parity, backward, both_decays, make_parameters


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("ours", "published"), [(DoG, dog.DoG), (LDoG, dog.LDoG)])
def test_dog(ours: Any, published: Any, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ours(p, reps_rel=1e-2, weight_decay=decay),
        lambda p: published(p, reps_rel=1e-2, weight_decay=decay),
        dtype,
    )


@pytest.mark.parametrize("rule", [DoG, LDoG])
def test_bfloat16_reaches_the_step_size_of_float32(rule: Any) -> None:
    """The step size depends on all steps so far, so the runs cannot be compared step by step."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = make_parameters(dtype)
        begin = [p.detach().clone() for p in parameters]
        optimizer = rule(parameters, reps_rel=1e-1)
        for step in range(25):
            backward(parameters, step)
            optimizer.step()
        moved.append(sum(float((p.detach() - q).float().norm()) for p, q in zip(parameters, begin, strict=True)))
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
