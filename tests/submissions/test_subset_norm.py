from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_optimizer import AdamWSN
from torch import Tensor

from submissions.subset_norm import SubsetNormRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

SHAPES = ((4, 6), (6, 4), (4, 6), (5, 5), (0, 3))
LR, BETAS, EPS, GAP = 0.01, (0.9, 0.95), 1e-6, 6


def hyperparameters(rank: int, decay: float, eps: float = EPS) -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": eps, "weight_decay": decay, "rank": rank, "refresh_every": GAP}


def subset_norm(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], rank: int, decay: float) -> Tensor:
    if not theta.numel():
        return theta
    G = g.T if g.shape[0] < g.shape[1] else g
    v = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * torch.stack([(row**2).sum() for row in G])
    memory["v"] = v
    if rank and (t - 1) % GAP == 0:
        memory["Q"], memory["m"] = torch.linalg.svd(G).Vh[:rank].T, 0.0
    Q = memory["Q"] if rank else torch.eye(G.shape[1], dtype=G.dtype)
    memory["m"] = BETAS[0] * memory.get("m", 0.0) + (1 - BETAS[0]) * G @ Q
    U = memory["m"] @ Q.T + (G - G @ Q @ Q.T)
    update = (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t) * U / (v.sqrt() + EPS)[:, None]
    return theta - LR * ((update.T if G is not g else update) + decay * theta)


@both_decays
@all_dtypes
@pytest.mark.parametrize("rank", [0, 3])
def test_subset_norm_and_subspace_momentum(rank: int, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: SubsetNormRule(p, hyperparameters(rank, decay)),
        transcription(subset_norm, rank=rank, decay=decay),
        dtype,
        shapes=SHAPES,
        tolerance=1e-7,
    )


def test_subset_norm_is_the_librarys_where_the_subsets_are_rows() -> None:
    """The library cuts the flattened tensor into subsets of a given size, and decays weights after the step."""
    assert_parity(
        lambda p: SubsetNormRule(p, hyperparameters(0, 0.0, 1e-8)),
        lambda p: AdamWSN([{"params": p, "sn": True}], lr=LR, betas=BETAS, subset_size=4, eps=1e-8),
        torch.float32,
        shapes=((6, 4), (4, 4)),
    )
