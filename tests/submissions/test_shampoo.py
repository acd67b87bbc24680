from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.shampoo import ShampooRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

SHAPES = ((4, 6), (6, 4), (4, 6), (1, 5), (3, 1), (0, 3))
EPS, START, EVERY = 1e-6, 3, 4


def shampoo(theta: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    lr, beta1, beta2 = 0.01, 0.9, 0.95

    def root(C: Tensor) -> Tensor:
        U, S, _ = torch.linalg.svd(C)
        return U @ torch.diag((S + EPS) ** -0.25) @ U.T

    if not G.numel():
        return theta
    L = beta2 * memory.get("L", 0) + (1 - beta2) * G @ G.T
    R = beta2 * memory.get("R", 0) + (1 - beta2) * G.T @ G
    M = beta1 * memory.get("M", 0) + (1 - beta1) * G
    V = beta2 * memory.get("V", 0) + (1 - beta2) * G**2
    A = M / (1 - beta1**t) / ((V / (1 - beta2**t)).sqrt() + 1e-8)
    memory |= {"L": L, "R": R, "M": M, "V": V}
    update = A
    if t > START:
        if (t - START - 1) % EVERY == 0:
            memory["roots"] = root(L / (1 - beta2**t)), root(R / (1 - beta2**t))
        P = memory["roots"][0] @ M @ memory["roots"][1]
        update = P * A.norm() / P.norm()
    return theta - lr * (update + decay * theta)


@both_decays
@all_dtypes
def test_shampoo(decay: float, dtype: torch.dtype) -> None:
    hyperparameters = {"lr": 0.01, "betas": (0.9, 0.95), "eps": EPS, "grafting_eps": 1e-8, "weight_decay": decay}
    hyperparameters |= {"precondition_frequency": EVERY, "start_step": START}
    # In float32 the zero eigenvalues of a singular matrix are rounding errors of 1e-7, not small against an ε of 1e-6.
    shapes = SHAPES if dtype != torch.float32 else ((5, 5), (1, 5), (3, 1), (0, 3))
    assert_parity(
        lambda p: ShampooRule(p, hyperparameters),
        transcription(shampoo, decay=decay),
        dtype,
        shapes=shapes,
        tolerance=1e-6,
    )


def test_the_root_is_the_inverse_fourth_root() -> None:
    p = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
    hyperparameters = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-12, "grafting_eps": 1e-8, "weight_decay": 0.0}
    rule = ShampooRule([p], hyperparameters | {"precondition_frequency": 1, "start_step": 0})
    g = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p.grad = g
    rule.step()
    root = rule.state[p]["root_0"]
    torch.testing.assert_close(torch.linalg.matrix_power(root, 4) @ g @ g.T, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices_are_left_alone(shape: tuple[int, int]) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.zeros(shape)
    hyperparameters = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-12, "grafting_eps": 1e-8, "weight_decay": 0.1}
    ShampooRule([p], hyperparameters | {"precondition_frequency": 1, "start_step": 0}).step()
