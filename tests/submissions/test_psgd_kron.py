from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer import Kron
from torch import Tensor, nn

from submissions.psgd_kron import KronRule, _balance_factors, _multiply, _multiply_triangular, update_probability
from tests.submissions.parity import assert_parity, both_decays, transcription

SHAPES = ((4, 6), (6, 4), (1, 5), (3, 3))
LIMIT = 5


def make_rule(p: Any, decay: float) -> KronRule:
    hyperparameters = {"lr": 0.01, "momentum": 0.9, "weight_decay": decay, "precondition_lr": 0.1}
    hyperparameters |= {"min_update_probability": 0.03, "max_size_triangular": LIMIT}
    return KronRule(p, hyperparameters, torch.Generator().manual_seed(7))


def kron(theta: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float, noise: torch.Generator) -> Tensor:
    """The equations of the module docstring with full matrices; a diagonal factor is kept diagonal by a mask."""
    mu, (m, n) = 0.1, G.shape

    def bound(C: Tensor) -> Tensor:
        x = C[:, C.norm(dim=0).argmax()]
        x = C @ x
        return (C @ (x / x.norm())).norm()

    QL = memory.get("QL", torch.eye(m, dtype=G.dtype))
    QR = memory.get("QR", torch.eye(n, dtype=G.dtype))
    memory["M"] = 0.9 * memory.get("M", 0) + 0.1 * G
    M = memory["M"] / (1 - 0.9**t)
    V = torch.randn((1, m, n), generator=noise, dtype=memory.get("dtype", torch.float64))[0].double()
    A, B = QL @ M @ QR.T, torch.linalg.inv(QL).T @ V @ torch.linalg.inv(QR)
    new = []
    for Q, plus, minus in ((QL, A @ A.T, B @ B.T), (QR, A.T @ A, B.T @ B)):
        if len(Q) == 1 or len(Q) > LIMIT:
            new.append(Q - mu * torch.diag(torch.diagonal(plus - minus)) @ Q / torch.diagonal(plus + minus).max())
        else:
            new.append(Q - mu * torch.triu(plus - minus) @ Q / bound(plus + minus))
    QL, QR = memory["QL"], memory["QR"] = new
    U = QL.T @ QL @ M @ QR.T @ QR
    return theta - 0.01 * (U * min(1.0, 1.1 / (float(U.square().mean().sqrt()) + 1e-6)) + decay * theta)


@both_decays
@pytest.mark.parametrize("shape", SHAPES)
def test_kron(decay: float, shape: tuple[int, int]) -> None:
    """One matrix at a time, so that both draw the same noise."""
    noise = torch.Generator().manual_seed(7)
    assert_parity(
        lambda p: make_rule(p, decay), transcription(kron, decay=decay, noise=noise), torch.float64, shapes=(shape,),
        tolerance=1e-7,
    )  # fmt: skip


@both_decays
@pytest.mark.parametrize("shape", SHAPES)
def test_kron_follows_the_library(decay: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise. The library balances the factors at random, which is switched off."""
    noise = torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: torch.randn(x.shape, generator=noise))
    monkeypatch.setattr(np.random, "random", lambda: 1.0)

    def library(p: Any) -> Any:
        narrow = [nn.Parameter(q.detach().float()) for q in p]
        optimizer = Kron(narrow, lr=0.01, momentum=0.9, weight_decay=decay, balance_prob=0.0, max_size_triangular=LIMIT)

        class Steps:
            @staticmethod
            def step() -> None:
                for q, float32 in zip(p, narrow, strict=True):
                    float32.grad = q.grad.float()
                optimizer.step()
                for q, float32 in zip(p, narrow, strict=True):
                    q.data.copy_(float32.data)

        return Steps()

    assert_parity(lambda p: make_rule(p, decay), library, torch.float32, shapes=(shape,))


@both_decays
def test_kron_rounds_bfloat16_once(decay: float) -> None:
    narrow, upcast = (nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (torch.bfloat16, torch.float32))
    for p in (narrow, upcast):
        kron_rule = make_rule([p], decay)
        for k in range(20):
            p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(k)).bfloat16().to(p.dtype)
            kron_rule.step()
        assert kron_rule.state[p]["factor_0"].dtype == torch.float32
    assert torch.allclose(narrow.float(), upcast, rtol=2**-6, atol=2**-6)


def test_kron_fits_its_factors_less_and_less_often() -> None:
    assert [round(update_probability(n, 0.03), 4) for n in (0, 500, 1500, 9000)] == [1.0, 1.0, 0.3679, 0.03]
    parameter = nn.Parameter(torch.eye(2))
    kron_rule = make_rule([parameter], 0.0)
    kron_rule.param_groups[0]["updates"] = 9000
    fits = []
    for step in range(100):
        parameter.grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(step))
        kron_rule.step()
        fits.append(kron_rule.param_groups[0]["fits"])
    assert fits.index(1) == 33 and fits[-1] == 2
    factor = kron_rule.state[parameter]["factor_0"]
    assert factor.isfinite().all() and torch.equal(factor, factor.triu())


def test_balancing_keeps_the_product_of_the_factors() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 4, 4), 100 * torch.randn(3, 5)
    product = torch.einsum("nij,nk->nijk", left, right)
    _balance_factors(left, right)
    assert torch.allclose(torch.einsum("nij,nk->nijk", left, right), product, rtol=1e-4)
    assert torch.allclose(left.abs().amax((1, 2)), right.abs().amax(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_products_leave_out_zeros_only(transposed: bool) -> None:
    torch.manual_seed(0)
    q, t = torch.randn(2, 601, 601).double().triu(), torch.randn(2, 601, 601).double().triu()
    x = torch.randn(2, 601, 7).double()
    torch.testing.assert_close(_multiply(q, x, transposed), (q.mT if transposed else q) @ x)
    torch.testing.assert_close(_multiply_triangular(t, q), t @ q)
