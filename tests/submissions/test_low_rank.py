"""GaLore, FRUGAL and DCT-AdamW against float64 transcriptions.

No library serves as a reference: pytorch_optimizer's GaLore is plain AdamW unless the parameter groups have keys that
its documentation omits, and the import of the authors' package needs a GPU library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from submissions.low_rank import DCTAdamWRule, FrugalRule, GaLoreRule, dct_basis
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

SHAPES = ((4, 6), (6, 4), (4, 6), (5, 5), (0, 3))
LR, BETAS, RANK, GAP = 0.01, (0.9, 0.95), 3, 6


def adam(memory: dict[str, Any], g: Tensor, t: int) -> Tensor:
    memory["m"] = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * g
    memory["v"] = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * g**2
    return memory["m"] / (1 - BETAS[0] ** t) / ((memory["v"] / (1 - BETAS[1] ** t)).sqrt() + 1e-8)


def transpose_wide(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """θ ← θ - η (rule(G) + λ θ), where the rule is given G with the longer side as rows."""

    def step(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float, **options: Any) -> Tensor:
        if not theta.numel():
            return theta
        flipped = g.shape[0] < g.shape[1]
        update = rule(g.T if flipped else g, t, memory, **options)
        return theta - LR * ((update.T if flipped else update) + decay * theta)

    return step


def adam_hyperparameters(decay: float) -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": 1e-8, "weight_decay": decay}


@transpose_wide
def galore(G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    if (t - 1) % GAP == 0:
        memory["Q"] = torch.linalg.svd(G).Vh[:RANK].T
    return 0.5 * adam(memory, G @ memory["Q"], t) @ memory["Q"].T


@both_decays
@all_dtypes
def test_galore(decay: float, dtype: torch.dtype) -> None:
    hyperparameters = adam_hyperparameters(decay) | {"rank": RANK, "refresh_every": GAP, "scale": 0.5}
    assert_parity(
        lambda p: GaLoreRule(p, hyperparameters),
        transcription(galore, decay=decay),
        dtype,
        shapes=SHAPES,
        tolerance=1e-7,
    )


@transpose_wide
def dct_adamw(G: Tensor, t: int, memory: dict[str, Any], feedback: bool) -> Tensor:
    """The moments are rotated by the matrix Q_prevᵀ Q_new."""
    n = G.shape[1]
    D = torch.tensor(
        [[(2 / n) ** 0.5 * torch.cos(torch.tensor(torch.pi * (i + 0.5) * j / n, dtype=torch.float64)) * (0.5**0.5
          if j == 0 else 1) for j in range(n)] for i in range(n)], dtype=torch.float64
    )  # fmt: skip
    A = G + memory.get("error", 0)
    columns = (A @ D).abs().sum(0).argsort(descending=True)[:RANK].sort().values
    Q = D[:, columns]
    if "Q" in memory:
        rotation = memory["Q"].T @ Q
        memory["m"], memory["v"] = memory["m"] @ rotation, (memory["v"] @ rotation).abs()
    memory["Q"] = Q
    if feedback:
        memory["error"] = A - A @ Q @ Q.T
    return adam(memory, A @ Q, t) @ Q.T


@both_decays
@all_dtypes
@pytest.mark.parametrize("feedback", [False, True])
def test_dct_adamw(feedback: bool, decay: float, dtype: torch.dtype) -> None:
    hyperparameters = adam_hyperparameters(decay) | {"rank": RANK, "error_feedback": feedback}
    assert_parity(
        lambda p: DCTAdamWRule(p, hyperparameters),
        transcription(dct_adamw, decay=decay, feedback=feedback),
        dtype,
        shapes=SHAPES,
        tolerance=1e-7,
    )


def test_the_dct_basis_is_orthonormal() -> None:
    basis = dct_basis(7, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(basis.T @ basis, torch.eye(7, dtype=torch.float64))
    assert torch.allclose(basis[:, 0], torch.full((7,), 7**-0.5, dtype=torch.float64))


@both_decays
@all_dtypes
def test_frugal(decay: float, dtype: torch.dtype) -> None:
    """The random columns are read from ours. Their number must be right, and they must change every `refresh_every`
    steps."""
    rules: list[FrugalRule] = []
    hyperparameters = adam_hyperparameters(decay) | {"density": 0.3, "refresh_every": GAP, "sign_scale": 0.5}
    seen: list[tuple[int, ...]] = []

    def ours(p: list[nn.Parameter]) -> FrugalRule:
        rules.append(FrugalRule(p, hyperparameters, torch.Generator().manual_seed(3)))
        return rules[0]

    def frugal(theta: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
        (parameter,) = rules[0].param_groups[0]["params"]
        chosen = rules[0].state[parameter]["columns"].tolist()
        if (t - 1) % GAP == 0:
            memory.clear()
            memory["columns"] = chosen
            seen.append(tuple(chosen))
            assert len(set(chosen)) == max(1, round(0.3 * G.shape[1])) and max(chosen) < G.shape[1]
        assert memory["columns"] == chosen
        update = 0.5 * torch.sign(G)
        update[:, chosen] = adam(memory, G[:, chosen], (t - 1) % GAP + 1)
        return theta - LR * (update + decay * theta)

    assert_parity(ours, transcription(frugal, decay=decay), dtype, shapes=((4, 9),), tolerance=1e-7)  # type: ignore[arg-type]
    assert len(seen) == 5 and len(set(seen)) > 2
