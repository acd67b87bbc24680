from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.lamb import Lamb
from submissions.lars import LARS
from submissions.vrgd import VRLARS, VRLamb
from tests.submissions.parity import (
    all_dtypes,
    assert_parity,
    both_decays,
    compute_gradients,
    submission_optimizer,
    transcription,
)


def lars(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 1; without decay the plain rule."""
    ratio = 1.0
    if decay and theta.norm() > 0 and g.norm() > 0:
        ratio = float(0.02 * theta.norm() / (g.norm() + decay * theta.norm()))
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.5 * ratio * (g + decay * theta)
    return theta - m


@both_decays
@all_dtypes
def test_lars(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: LARS(p, lr=0.5, momentum=0.9, trust=0.02, weight_decay=decay), transcription(lars, decay=decay), dtype
    )


@pytest.mark.parametrize("smoothed", [False, True])
def test_vr_lars_and_vr_lamb_are_their_rules_on_scaled_gradients(smoothed: bool) -> None:
    """r from the gradients of the four examples, one by one; smoothed for VR-LAMB."""
    options: dict[str, Any] = {"pieces": 4, "gamma": 0.1}
    if smoothed:
        make = submission_optimizer(
            VRLamb, needs=VRLamb.needs, lr=0.1, betas=(0.9, 0.99), beta3=0.8, weight_decay=0.1, **options
        )
    else:
        make = submission_optimizer(VRLARS, needs=VRLARS.needs, lr=0.5, trust=0.02, weight_decay=0.3, **options)

    def reference(parameters: Any) -> Any:
        rule: Any = (
            Lamb(parameters, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
            if smoothed
            else LARS(parameters, lr=0.5, trust=0.02, weight_decay=0.3)
        )
        averages = [torch.zeros_like(p) for p in parameters]
        count = iter(range(10**6))

        class Scaled:
            def step(self) -> None:
                step = next(count)
                pieces = [compute_gradients(parameters, step, slice(k, k + 1)) for k in range(4)]
                for k, p in enumerate(parameters):
                    if not p.numel():
                        continue
                    g = torch.stack([piece[k] for piece in pieces])
                    r = g.mean(0) ** 2 / (g**2).mean(0).sub(g.mean(0) ** 2)
                    r = (r / r.mean()).clip(0.1, 1)
                    if smoothed:
                        averages[k] = 0.8 * averages[k] + 0.2 * r
                        r = averages[k] / (1 - 0.8 ** (step + 1))
                    p.grad = r * g.mean(0)
                rule.step()

        return Scaled()

    assert_parity(make, reference, torch.float64, shapes=((4, 6), (5,)), tolerance=1e-6)
