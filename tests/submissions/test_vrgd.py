from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from submissions.vrgd import VRSGD, VRAdam
from tests.submissions.parity import assert_parity, both_decays, compute_gradients, submission_optimizer

GAMMA = 0.1
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class Reference:
    """Algorithms 1 and 3 with four micro-batches of one example."""

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, decay: float) -> None:
        self.parameters, self.kind, self.decay, self.t = list(parameters), kind, decay, 0
        self.memories: list[dict[str, Any]] = [{} for _ in parameters]

    def step(self) -> None:
        gradients = [compute_gradients(self.parameters, self.t, slice(k, k + 1)) for k in range(4)]
        self.t += 1
        for i, (p, memory) in enumerate(zip(self.parameters, self.memories, strict=True)):
            if p.numel():
                p.data = self.update(p.detach(), torch.stack([of_example[i] for of_example in gradients]), memory)

    def update(self, theta: Tensor, g: Tensor, memory: dict[str, Any]) -> Tensor:
        mean = g.mean(0)
        r = mean**2 / (g.var(0, unbiased=False) + 1e-300)
        r = (r / r.mean()).clamp(GAMMA, 1)
        if self.kind == "sgd":
            memory["b"] = 0.9 * memory.get("b", 0) + r * mean + self.decay * theta
            return theta - 0.01 * memory["b"]
        memory["p"] = 0.8 * memory.get("p", 0) + 0.2 * r
        scaled = memory["p"] / (1 - 0.8**self.t) * mean
        memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * scaled
        memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * scaled**2
        update = memory["m"] / (1 - 0.9**self.t) / ((memory["v"] / (1 - 0.99**self.t)).sqrt() + 1e-8)
        return theta - 0.01 * (update + self.decay * theta)


@both_decays
@wide_dtypes
def test_vr_sgd(decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        submission_optimizer(
            VRSGD, needs=VRSGD.needs, lr=0.01, momentum=0.9, weight_decay=decay, pieces=4, gamma=GAMMA
        ),
        lambda p: Reference(p, "sgd", decay),  # type: ignore[arg-type, return-value]
        dtype,
    )


@both_decays
@wide_dtypes
def test_vr_adam(decay: float, dtype: torch.dtype) -> None:
    hyperparameters = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "beta3": 0.8,
        "weight_decay": decay,
        "pieces": 4,
        "gamma": GAMMA,
    }
    assert_parity(
        submission_optimizer(VRAdam, needs=VRAdam.needs, **hyperparameters),
        lambda p: Reference(p, "adam", decay),  # type: ignore[arg-type, return-value]
        dtype,
    )


@pytest.mark.parametrize("cls", [VRSGD, VRAdam])
def test_bfloat16_parameters_take_the_same_ratios(cls: Any) -> None:
    """The state of the base, torch's optimizer, is bfloat16; the ratios are float32."""
    parameters = [nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))]
    steps = submission_optimizer(cls, needs=cls.needs, lr=0.1, pieces=4)(parameters)
    for _ in range(20):
        steps.step()
    assert parameters[0].isfinite().all() and not torch.equal(parameters[0], torch.ones(4, 6, dtype=torch.bfloat16))
