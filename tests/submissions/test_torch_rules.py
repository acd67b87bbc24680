"""torch's optimizers against the papers. Not in bfloat16, since torch's state then is bfloat16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.submissions.parity import assert_parity, both_decays, transcription


def moments(g: Tensor, t: int, memory: dict[str, Any]) -> tuple[Tensor, Tensor]:
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0 * g) + 0.001 * g**2
    return m / (1 - 0.9**t), v / (1 - 0.999**t)


def adam(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m, v = moments(g + decay * theta, t, memory)
    return theta - 0.01 * m / (v.sqrt() + 1e-8)


def adamw(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    m, v = moments(g, t, memory)
    return theta - 0.01 * (m / (v.sqrt() + 1e-8) + decay * theta)


def amsgrad(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """The maximum of the uncorrected v, as in the paper."""
    m, _ = moments(g, t, memory)
    largest = memory["max"] = torch.maximum(memory.get("max", 0 * g), memory["v"])
    return theta - 0.01 * (m / ((largest / (1 - 0.999**t)).sqrt() + 1e-8) + decay * theta)


def radam(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2; torch rectifies from ρ > 5 on as the authors' code does, the paper from 4."""
    m, _ = moments(g, t, memory)
    limit = 2 / (1 - 0.999) - 1
    rho = limit - 2 * t * 0.999**t / (1 - 0.999**t)
    theta = theta - 0.01 * decay * theta
    if rho <= 5:
        return theta - 0.01 * m
    r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return theta - 0.01 * r * m / ((memory["v"].sqrt() + 1e-8) / (1 - 0.999**t) ** 0.5)


def adagrad(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    g = g + decay * theta
    total = memory["sum"] = memory.get("sum", 0 * g) + g**2
    return theta - 0.01 * g / (total.sqrt() + 1e-10)


def rmsprop(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    g = g + decay * theta
    v = memory["v"] = 0.99 * memory.get("v", 0 * g) + 0.01 * g**2
    step = memory["b"] = 0.9 * memory.get("b", 0 * g) + g / (v.sqrt() + 1e-8)
    return theta - 0.01 * step


def adamax(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 2 of the paper, with torch's ε beside the gradient."""
    g = g + decay * theta
    m = memory["m"] = 0.9 * memory.get("m", 0 * g) + 0.1 * g
    u = memory["u"] = torch.maximum(0.999 * memory.get("u", 0 * g), g.abs() + 1e-8)
    return theta - 0.01 / (1 - 0.9**t) * m / u


def adadelta(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    g = g + decay * theta
    square = memory["g"] = 0.95 * memory.get("g", 0 * g) + 0.05 * g**2
    step = g * (memory.get("x", 0 * g) + 1e-6).sqrt() / (square + 1e-6).sqrt()
    memory["x"] = 0.95 * memory.get("x", 0 * g) + 0.05 * step**2
    return theta - step


def nadamw(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Dozat's schedule of the momentum, μ = β1 (1 - 0.96^(0.004 t) / 2)."""
    moments(g, t, memory)
    mu, after = (0.9 * (1 - 0.5 * 0.96 ** (k * 4e-3)) for k in (t, t + 1))
    product = memory["product"] = memory.get("product", 1.0) * mu
    m = after * memory["m"] / (1 - product * after) + (1 - mu) * g / (1 - product)
    theta = theta - 0.01 * decay * theta
    return theta - 0.01 * m / ((memory["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


def sgd(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    g = g + decay * theta
    v = memory["v"] = 0.9 * memory.get("v", 0 * g) + g
    return theta - 0.01 * (g + 0.9 * v)


RULES = [
    (torch.optim.Adam, adam, {}),
    (torch.optim.AdamW, adamw, {}),
    (torch.optim.AdamW, amsgrad, {"amsgrad": True}),
    (torch.optim.NAdam, nadamw, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, radam, {"decoupled_weight_decay": True}),
    (torch.optim.Adagrad, adagrad, {}),
    (torch.optim.RMSprop, rmsprop, {"momentum": 0.9}),
    (torch.optim.Adamax, adamax, {}),
    (torch.optim.Adadelta, adadelta, {"lr": 1.0, "rho": 0.95}),
    (torch.optim.SGD, sgd, {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("published", "paper", "options"), RULES, ids=[paper.__name__ for _, paper, _ in RULES])
@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torch_is_faithful(
    published: Any, paper: Any, options: dict[str, Any], decay: float, dtype: torch.dtype
) -> None:
    assert_parity(
        lambda p: published(p, **{"lr": 0.01, "weight_decay": decay} | options),
        transcription(paper, decay=decay),
        dtype,
        tolerance=1e-7,
    )
