from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.kl_shampoo import KLShampooRule, KLSOAPRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

# On square matrices of full rank the first eigenvectors are unique.
SHAPES = ((5, 5), (3, 3), (5, 5))


def kl(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, soap: bool, every: int) -> Tensor:
    """Equations of the paper with the factors themselves, not rotated: L⁻¹ from its basis and estimated eigenvalues."""
    m, n = G.shape
    if t == 1:
        memory["L"], memory["R"] = G @ G.T / n, G.T @ G / m
        memory["QL"] = torch.linalg.eigh(memory["L"]).eigenvectors.flip(1)
        memory["QR"] = torch.linalg.eigh(memory["R"]).eigenvectors.flip(1)
        memory["l"], memory["r"] = (torch.full((k,), 0.1, dtype=G.dtype) for k in (m, n))
        memory["M"], memory["V"] = torch.zeros_like(G), torch.zeros_like(G)
        return W - 0.01 * decay * W
    QL, QR, left, right = (memory[name] for name in ("QL", "QR", "l", "r"))
    memory["M"] = 0.9 * memory["M"] + 0.1 * G
    rotated = QL.T @ G @ QR
    if soap:
        memory["V"] = 0.7 * memory["V"] + 0.3 * rotated**2
        direction = QL @ ((QL.T @ memory["M"] @ QR) / (memory["V"].sqrt() + 1e-3)) @ QR.T
    else:
        roots = QL @ torch.diag(left**-0.5) @ QL.T, QR @ torch.diag(right**-0.5) @ QR.T
        direction = roots[0] @ memory["M"] @ roots[1]
    L_inverse, R_inverse = QL @ torch.diag(1 / left) @ QL.T, QR @ torch.diag(1 / right) @ QR.T
    memory["L"] = 0.8 * memory["L"] + 0.2 * G @ R_inverse @ G.T / n
    memory["R"] = 0.8 * memory["R"] + 0.2 * G.T @ L_inverse @ G / m
    memory["l"] = 0.8 * left + 0.2 * (rotated**2 / right).mean(1)
    memory["r"] = 0.8 * right + 0.2 * (rotated**2 / left.unsqueeze(1)).mean(0)
    if (t - 1) % every == 0:
        memory["QL"], memory["QR"] = torch.linalg.qr(memory["L"] @ QL).Q, torch.linalg.qr(memory["R"] @ QR).Q
    return W - 0.01 * (direction + decay * W)


@both_decays
@all_dtypes
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("soap", [False, True])
def test_kl(soap: bool, every: int, decay: float, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": decay, "precondition_frequency": every}
    options |= {"initial_eigenvalue": 0.1, "betas": (0.9, 0.8, 0.7) if soap else (0.9, 0.8), "eps": 1e-3}
    rule = KLSOAPRule if soap else KLShampooRule
    reference = transcription(kl, decay=decay, soap=soap, every=every)
    assert_parity(lambda p: rule(p, options), reference, dtype, shapes=SHAPES, tolerance=1e-6)
