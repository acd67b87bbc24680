from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from submissions.swats import Swats
from tests.submissions.parity import assert_parity, both_decays


class Reference:
    """Algorithm 1 on all parameters as one vector, with the paper's names; pytorch_optimizer switches per tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, tolerance: float) -> None:
        self.parameters, self.decay, self.tolerance = list(parameters), decay, tolerance
        w = self.flat()
        self.m, self.a, self.v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
        self.k, self.lam, self.rate = 0, 0.0, None

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def step(self) -> None:
        g = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        w, self.k = self.flat(), self.k + 1
        new = w - 0.01 * self.decay * w
        if self.rate is not None:
            self.v = 0.9 * self.v + g
            new = new - 0.1 * self.rate * self.v
        else:
            self.m, self.a = 0.9 * self.m + 0.1 * g, 0.99 * self.a + 0.01 * g**2
            correction = (1 - 0.99**self.k) ** 0.5
            p = -0.01 * correction / (1 - 0.9**self.k) * self.m / (self.a.sqrt() + 1e-8 * correction)
            new = new + p
            gamma = float(p @ p / -(p @ g))
            self.lam = 0.99 * self.lam + 0.01 * gamma
            if self.k > 1 and abs(self.lam / (1 - 0.99**self.k) - gamma) < self.tolerance:
                self.rate = self.lam / (1 - 0.99**self.k)
        pieces = new.split([p.numel() for p in self.parameters])
        for p, piece in zip(self.parameters, pieces, strict=True):
            p.data = piece.reshape(p.shape)


@both_decays
@pytest.mark.parametrize(("tolerance", "switches"), [(1e-9, False), (2e-3, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_swats(decay: float, tolerance: float, switches: bool, dtype: torch.dtype) -> None:
    rules: list[Swats] = []

    def ours(p: Sequence[nn.Parameter]) -> Swats:
        rules.append(Swats(p, lr=0.01, betas=(0.9, 0.99), weight_decay=decay, tolerance=tolerance))
        return rules[0]

    assert_parity(ours, lambda p: Reference(p, decay, tolerance), dtype)  # type: ignore[arg-type, return-value]
    assert (rules[0].param_groups[0]["sgd_rate"] is not None) == switches


@pytest.mark.parametrize("phase", ["adam", "sgd"])
def test_bfloat16_makes_the_same_steps(phase: str) -> None:
    """Each phase separately, since the step of the switch depends on rounding."""
    rules = [
        Swats(p, lr=0.01) for p in ([nn.Parameter(torch.ones(4, dtype=d))] for d in (torch.bfloat16, torch.float32))
    ]
    for rule in rules:
        if phase == "sgd":
            rule.param_groups[0]["sgd_rate"] = 2.0
        p = rule.param_groups[0]["params"][0]
        for k in range(5):
            p.grad = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=p.dtype) * (k + 1)
            rule.step()
    narrow, upcast = (rule.param_groups[0]["params"][0].detach().float() for rule in rules)
    assert torch.allclose(narrow, upcast, rtol=2**-6)
