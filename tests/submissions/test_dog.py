from __future__ import annotations

from typing import Any

import dog
import pytest
import torch

from submissions.dog import DoG, LDoG
from tests.submissions.parity import backward, both_decays, follows, start


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("ours", "published"), [(DoG, dog.DoG), (LDoG, dog.LDoG)])
def test_dog(ours: Any, published: Any, decay: float, dtype: torch.dtype) -> None:
    follows(
        lambda p: ours(p, reps_rel=1e-2, weight_decay=decay),
        lambda p: published(p, reps_rel=1e-2, weight_decay=decay),
        dtype,
    )


@pytest.mark.parametrize("rule", [DoG, LDoG])
def test_bfloat16_finds_the_step_size_of_float32(rule: Any) -> None:
    """The step size depends on the whole way, so a comparison step by step is none."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = start(dtype)
        begin = [p.detach().clone() for p in parameters]
        optimizer = rule(parameters, reps_rel=1e-1)
        for step in range(25):
            backward(parameters, step)
            optimizer.step()
        moved.append(sum(float((p.detach() - q).float().norm()) for p, q in zip(parameters, begin, strict=True)))
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
