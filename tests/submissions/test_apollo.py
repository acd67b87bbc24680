"""Low-rank scalings against transcriptions, in the tall orientation that the rules work in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.apollo import ApolloRule, FiraRule
from submissions.conda import CondaRule
from submissions.cosmos import CosmosRule
from submissions.ldadam import LDAdamRule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

SHAPES = ((6, 4), (4, 6), (6, 4), (5, 5))
ADAM = {"lr": 0.01, "betas": (0.9, 0.8), "eps": 1e-3}
RANK = 2


def tall(equations: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Equations for m ≥ n, of the transpose otherwise."""

    def apply(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float = 0.0, **options: Any) -> Tensor:
        if len(G) < len(G.T):
            return apply(W.T, G.T, t, memory, decay, **options).T
        return W - 0.01 * (equations(G, t, memory, **options) + decay * W)

    return apply


def adam(R: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * R
    v = memory["v"] = 0.8 * memory.get("v", 0) + 0.2 * R**2
    return m / (1 - 0.9**t) / ((v / (1 - 0.8**t)).sqrt() + 1e-3)


def limited(U: Tensor, memory: dict[str, Any]) -> Tensor:
    last = memory.get("last")
    if last is not None and U.norm() > 1.01 * last:
        U = U * (1.01 * last / U.norm())
    memory["last"] = U.norm()
    return U


def singular_vectors(M: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(M, full_matrices=False).Vh[:rank].T


@tall
def fira(G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    if (t - 1) % 3 == 0:
        memory["P"] = singular_vectors(G, RANK)
    P = memory["P"]
    R = G @ P
    psi = adam(R, t, memory)
    phi = psi.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True)
    return 0.5 * psi @ P.T + limited(phi * (G - 0.5 * R @ P.T), memory)


@tall
def apollo(G: Tensor, t: int, memory: dict[str, Any], P: list[Tensor], per_tensor: bool) -> Tensor:
    """P: the projections, which are drawn and so handed over."""
    R = G @ P[(t - 1) // 3]
    R_tilde = adam(R, t, memory)
    s = R_tilde.norm() / R.norm() if per_tensor else (R_tilde.norm(dim=1) / R.norm(dim=1)).unsqueeze(1)
    return limited(2.0 * s * G, memory)


@tall
def conda(G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    M = memory["M"] = 0.9 * memory.get("M", 0) + 0.1 * G
    if (t - 1) % 3 == 0:
        memory["Q"] = singular_vectors(M, G.shape[1])
    Q = memory["Q"]
    V = memory["V"] = 0.8 * memory.get("V", 0) + 0.2 * (G @ Q) ** 2
    return 0.5 * (M @ Q / (1 - 0.9**t)) / ((V / (1 - 0.8**t)).sqrt() + 1e-3) @ Q.T


@tall
def cosmos(G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    m, n = G.shape
    if t == 1:
        memory |= {"U": singular_vectors(G, RANK), "S": torch.zeros(RANK, RANK, dtype=G.dtype), "M": 0, "V": 0}
    U, S = memory["U"], memory["S"]
    M = memory["M"] = 0.9 * memory["M"] + 0.1 * G
    new = torch.linalg.qr(0.8 * U @ S + 0.2 * G.T @ G @ U).Q
    memory["S"], memory["U"] = new.T @ (0.8 * U @ S @ U.T + 0.2 * G.T @ G) @ new, new
    V = memory["V"] = 0.8 * memory["V"] + 0.2 * (G @ new) ** 2
    A = (M @ new / (1 - 0.9**t)) / ((V + 1e-3) / (1 - 0.8**t)).sqrt() @ new.T
    left, s, right = torch.linalg.svd(M - M @ new @ new.T, full_matrices=False)
    x = s / s.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    B = left @ torch.diag(x) @ right
    B = n**0.5 * B / B.norm()
    combined = A + 0.3 * m**0.5 * B
    return n**0.5 * combined / combined.norm()


@tall
def ldadam(G: Tensor, t: int, memory: dict[str, Any], feedback: bool) -> Tensor:
    A = G + memory.get("E", 0)
    if t == 1:
        P = P_new = singular_vectors(A, RANK)
        m, v = torch.zeros(len(G), RANK, dtype=G.dtype), torch.zeros(len(G), RANK, dtype=G.dtype)
        m_tilde, v_tilde = m, v
    else:
        P, m, v = memory["P"], memory["m"], memory["v"]
        m_hat, v_hat = m / (1 - 0.9 ** (t - 1)), v / (1 - 0.8 ** (t - 1))
        B = 0.7 * m_hat @ P.T + 0.3 * A
        P_new = torch.linalg.qr(B.T @ B @ P).Q
        Q = P.T @ P_new
        m_tilde = m @ Q
        v_tilde = (1 - 0.8 ** (t - 1)) * ((v_hat - m_hat**2) @ (Q * Q) + (m_hat @ Q) ** 2).abs()
    g = A @ P_new
    if feedback:
        memory["E"] = A - g @ P_new.T + 0.9 / 0.1 * (m @ P.T - m_tilde @ P_new.T)
    m, v = 0.9 * m_tilde + 0.1 * g, 0.8 * v_tilde + 0.2 * g**2
    memory |= {"P": P_new, "m": m, "v": v}
    return m / (1 - 0.9**t) / ((v / (1 - 0.8**t)).sqrt() + 1e-3) @ P_new.T


@both_decays
@all_dtypes
@pytest.mark.parametrize(
    ("rule", "options", "equations"),
    [
        (FiraRule, {"rank": RANK, "refresh_every": 3, "scale": 0.5}, fira),
        (CondaRule, {"refresh_every": 3, "scale": 0.5}, conda),
    ],
)
def test_low_rank(rule: Any, options: dict[str, Any], equations: Any, dtype: torch.dtype, decay: float) -> None:
    assert_parity(
        lambda p: rule(p, ADAM | options | {"weight_decay": decay}), transcription(equations, decay=decay), dtype,
        shapes=SHAPES, tolerance=1e-6,
    )  # fmt: skip


@both_decays
@pytest.mark.parametrize("per_tensor", [False, True])
def test_apollo(per_tensor: bool, decay: float) -> None:
    """A rule for each matrix, since the projections of all are drawn together."""
    for shape in ((6, 4), (4, 6)):
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(1, 4, RANK, generator=generator)[0].double() / RANK**0.5 for _ in range(9)]
        options = ADAM | {"rank": RANK, "refresh_every": 3, "scale": 2.0, "per_tensor": per_tensor}
        assert_parity(
            lambda p, options=options: ApolloRule(  # type: ignore[misc]
                p, options | {"weight_decay": decay}, torch.Generator().manual_seed(3)
            ),
            transcription(apollo, decay=decay, P=drawn, per_tensor=per_tensor), torch.float64, shapes=(shape,),
            tolerance=1e-7,
        )  # fmt: skip


@both_decays
@pytest.mark.parametrize("feedback", [False, True])
def test_ldadam(feedback: bool, decay: float) -> None:
    options = ADAM | {"rank": RANK, "rho": 0.7, "error_feedback": feedback, "weight_decay": decay}
    assert_parity(
        lambda p: LDAdamRule(p, options), transcription(ldadam, decay=decay, feedback=feedback), torch.float64,
        shapes=SHAPES, tolerance=1e-5,
    )  # fmt: skip


@both_decays
def test_cosmos(decay: float) -> None:
    options = ADAM | {"rank": RANK, "muon_share": 0.3, "weight_decay": decay}
    assert_parity(
        lambda p: CosmosRule(p, options), transcription(cosmos, decay=decay), torch.float64, shapes=SHAPES,
        tolerance=1e-6,
    )  # fmt: skip
