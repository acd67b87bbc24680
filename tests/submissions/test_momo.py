from __future__ import annotations

from typing import Any

import momo
import pytest
import torch

from submissions.momo import MoMoAdamRule, MoMoRule
from tests.submissions.parity import assert_parity, both_decays, compute_loss


class WithLoss:
    """The step of a rule that needs the loss, on the loss of the parity tests."""

    def __init__(self, optimizer: Any, parameters: Any) -> None:
        self.optimizer, self.parameters, self.count = optimizer, parameters, 0

    def step(self) -> None:
        value = compute_loss(self.parameters, self.count).detach()
        self.count += 1
        if isinstance(self.optimizer, MoMoRule):
            self.optimizer.loss = float(value)
            self.optimizer.step()
        else:
            self.optimizer.step(loss=value)


@both_decays
@pytest.mark.parametrize("lr", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_momo(decay: float, lr: float, dtype: torch.dtype) -> None:
    """lr 1 lets the Polyak step decide."""
    assert_parity(
        lambda p: WithLoss(MoMoRule(p, lr, 0.9, decay, 0.5), p),  # type: ignore[arg-type, return-value]
        lambda p: WithLoss(momo.Momo(p, lr=lr, beta=0.9, weight_decay=decay, lb=0.5), p),  # type: ignore[arg-type, return-value]
        dtype,
    )


@both_decays
@pytest.mark.parametrize("lr", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_momo_adam(decay: float, lr: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: WithLoss(MoMoAdamRule(p, lr, (0.9, 0.999), 1e-8, decay, 0.5), p),  # type: ignore[arg-type, return-value]
        lambda p: WithLoss(momo.MomoAdam(p, lr=lr, weight_decay=decay, lb=0.5), p),  # type: ignore[arg-type, return-value]
        dtype,
        # The package keeps ⟨g, θ⟩ in float32.
        tolerance=1e-6,
    )
