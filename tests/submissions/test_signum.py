"""Signum, simplified AdEMAMix and SCALE against transcriptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Role
from submissions.scale import Scale, ScaleRule
from submissions.signum import Signum
from submissions.simplified_ademamix import SimplifiedAdEMAMix
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, make_setup, transcription


def signum(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, beta: float) -> Tensor:
    m = memory["m"] = beta * memory.get("m", 0) + (1 - beta) * g
    return theta - 0.01 * (m.sign() + decay * theta)


@both_decays
@all_dtypes
@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_signum(beta: float, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: Signum(p, lr=0.01, momentum=beta, weight_decay=decay), transcription(signum, decay=decay, beta=beta),
        dtype,
    )  # fmt: skip


def test_sign_sgd_keeps_no_state() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    rule = Signum([p], momentum=0.0)
    rule.step()
    assert rule.state[p] == {"step": 1}


def simplified(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, steps: int) -> Tensor:
    beta = 0.95
    if t < steps:
        # Half-lives: ln 2 / ln 1/β of 0.5 and of 0.95, and between them in proportion.
        start, end = 1.0, 13.513407333964873
        beta = 0.5 ** (1 / (start + t / steps * (end - start)))
    m = memory["m"] = beta * memory.get("m", 0) + g
    v = memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * g**2
    return theta - 0.01 * ((m + 3 * g) / ((v / (1 - 0.9**t)).sqrt() + 1e-8) + decay * theta)


@both_decays
@all_dtypes
@pytest.mark.parametrize("steps", [0, 10])
def test_simplified_ademamix(steps: int, decay: float, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.95, 0.9), "alpha": 3.0, "weight_decay": decay}
    options |= {"beta1_start": 0.5, "beta1_steps": steps}
    reference = transcription(simplified, decay=decay, steps=steps)
    assert_parity(lambda p: SimplifiedAdEMAMix(p, **options), reference, dtype)


def scale(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, beta: float) -> Tensor:
    M = memory["M"] = beta * memory.get("M", 0) + (1 - beta) * G
    return W - 0.01 * (M / M.norm(dim=0, keepdim=True) + decay * W)


@both_decays
@all_dtypes
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_scale(beta: float, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: ScaleRule(p, lr=0.01, momentum=beta, weight_decay=decay),
        transcription(scale, decay=decay, beta=beta), dtype, shapes=((4, 6), (6, 4), (3, 2, 3, 3)),
    )  # fmt: skip


def test_scale_has_momentum_for_the_head_alone() -> None:
    shapes = {"embedding": (5, 3), "matrix": (3, 3), "norm": (3,), "head": (5, 3)}
    roles = {"embedding": Role.EMBEDDING, "matrix": Role.HIDDEN_MATRIX, "norm": Role.NORM, "head": Role.HEAD}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    rule, adamw = Scale(make_setup(named, roles, needs=Scale.needs)).optimizers
    rest = [(tuple(p.shape), g["momentum"]) for g in rule.param_groups for p in g["params"] if p is not named["head"]]
    assert dict(rest) == {
        (5, 3): 0.0, (3, 3): 0.0,
    }  # fmt: skip
    assert [g["momentum"] for g in rule.param_groups if g["params"][0] is named["head"]] == [0.9]
    assert [p.shape for g in adamw.param_groups for p in g["params"]] == [(3,)]
