from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from submissions.swats import Swats
from tests.submissions.parity import assert_parity, both_decays


class Reference:
    """Algorithm 1 on all parameters as one vector, with the paper's names; pytorch_optimizer switches per tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, tolerance: float, criterion: str) -> None:
        self.parameters, self.decay, self.tolerance = list(parameters), decay, tolerance
        self.criterion = criterion
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
            corrected = self.lam / (1 - 0.99**self.k)
            allowed = self.tolerance * (corrected if self.criterion == "relative" else 1)
            if self.k > 1 and abs(corrected - gamma) < allowed:
                self.rate = corrected
        pieces = new.split([p.numel() for p in self.parameters])
        for p, piece in zip(self.parameters, pieces, strict=True):
            p.data = piece.reshape(p.shape)


@both_decays
@pytest.mark.parametrize(
    ("criterion", "tolerance", "switches"),
    [("absolute", 1e-9, False), ("absolute", 2e-3, True), ("relative", 1e-6, False), ("relative", 0.05, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_swats(decay: float, criterion: str, tolerance: float, switches: bool, dtype: torch.dtype) -> None:
    rules: list[Swats] = []

    def ours(p: Sequence[nn.Parameter]) -> Swats:
        options = {"tolerance": tolerance, "criterion": criterion}
        rules.append(Swats(p, lr=0.01, betas=(0.9, 0.99), weight_decay=decay, **options))  # type: ignore[arg-type]
        return rules[0]

    assert_parity(ours, lambda p: Reference(p, decay, tolerance, criterion), dtype)  # type: ignore[arg-type, return-value]
    assert (rules[0].param_groups[0]["sgd_rate"] is not None) == switches
    assert (rules[0].record_summary()["switched_after"] is not None) == switches


def test_a_learning_rate_of_zero_switches_nothing() -> None:
    """Equal gradients make every γ equal, so that any other rate does at its second step."""
    for rate, switched_after in ((0.01, 2), (0.0, None)):
        p = nn.Parameter(torch.ones(4))
        rule = Swats([p], lr=0.01, criterion="absolute", tolerance=1e-3)
        rule.param_groups[0]["lr"] = rate
        for _ in range(4):
            p.grad = torch.ones(4)
            rule.step()
        assert rule.record_summary() == {"switched_after": switched_after}


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
