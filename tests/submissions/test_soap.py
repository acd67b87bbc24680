from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_optimizer import SOAP as LibrarySOAP
from torch import Tensor

from submissions.soap import SOAPRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

# Where L or R is singular its eigenvectors are not unique, and neither is the update. So one side of each matrix that
# is not square is longer than `max_precondition_dim`.
SHAPES = ((5, 5), (3, 3), (5, 5), (4, 6), (6, 4))
LIMIT = 5


def soap(theta: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, every: int) -> Tensor:
    """Algorithm 3 of the paper, with the authors' first step and order of the basis."""
    lr, beta1, beta2, eps = 0.01, 0.9, 0.95, 1e-8
    L = beta2 * memory.get("L", 0) + (1 - beta2) * G @ G.T
    R = beta2 * memory.get("R", 0) + (1 - beta2) * G.T @ G
    theta = theta - lr * decay * theta
    if t == 1:
        QL = torch.linalg.eigh(L).eigenvectors.flip(1) if len(G) <= LIMIT else torch.eye(len(G)).double()
        QR = torch.linalg.eigh(R).eigenvectors.flip(1) if len(G.T) <= LIMIT else torch.eye(len(G.T)).double()
        memory |= {"L": L, "R": R, "QL": QL, "QR": QR, "M": torch.zeros_like(G), "V": torch.zeros_like(G)}
        return theta
    QL, QR = memory["QL"], memory["QR"]
    M = beta1 * memory["M"] + (1 - beta1) * G
    V = beta2 * memory["V"] + (1 - beta2) * (QL.T @ G @ QR) ** 2
    steps = t - 1
    N = (QL.T @ M @ QR) / (1 - beta1**steps) / ((V / (1 - beta2**steps)).sqrt() + eps)
    theta = theta - lr * QL @ N @ QR.T
    if steps % every == 0:
        if len(G) <= LIMIT:
            left = torch.diagonal(QL.T @ L @ QL).argsort(descending=True)
            QL, V = torch.linalg.qr(L @ QL[:, left]).Q, V[left]
        if len(G.T) <= LIMIT:
            right = torch.diagonal(QR.T @ R @ QR).argsort(descending=True)
            QR, V = torch.linalg.qr(R @ QR[:, right]).Q, V[:, right]
    memory |= {"L": L, "R": R, "QL": QL, "QR": QR, "M": M, "V": V}
    return theta


def make_rule(p: Any, decay: float, every: int, limit: int = LIMIT) -> SOAPRule:
    adam = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    return SOAPRule(p, adam | {"precondition_frequency": every, "max_precondition_dim": limit})


@both_decays
@all_dtypes
@pytest.mark.parametrize("every", [1, 5])
def test_soap(decay: float, dtype: torch.dtype, every: int) -> None:
    assert_parity(
        lambda p: make_rule(p, decay, every), transcription(soap, decay=decay, every=every), dtype, shapes=SHAPES,
        tolerance=1e-7,
    )  # fmt: skip


def test_soap_is_the_librarys_between_two_refreshes() -> None:
    """The library's refresh sorts neither the basis nor V, so only the steps before the first refresh are the same."""
    assert_parity(
        lambda p: make_rule(p, 0.0, 1000),
        lambda p: LibrarySOAP(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=1000),
        torch.float32,
        shapes=((5, 5), (3, 3)),
    )
