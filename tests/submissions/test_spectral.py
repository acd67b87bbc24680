"""Muon's family against transcriptions of the papers' equations, in which the maps act on singular values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.hyperparameters import check_hyperparameters
from submissions.polar import map_spectrum
from submissions.spectral import Spectral, SpectralRule
from submissions.two_ema_muon import TwoEMAMuon, TwoEMARule
from tests.submissions.parity import all_dtypes, assert_parity, both_decays, transcription

SHAPES = ((4, 6), (6, 4), (4, 6), (5, 5))
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
EXPRESS = [  # the paper's Table: (a, b, c) of the first five steps, to four decimals as printed
    (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518), (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188),
]  # fmt: skip


def on_singular_values(M: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ torch.diag(f(S)) @ Vh


def polynomial(coefficients: list[tuple[float, float, float]]) -> Callable[[Tensor], Tensor]:
    def apply(s: Tensor) -> Tensor:
        x = s / s.norm()
        for a, b, c in coefficients:
            x = a * x + b * x**3 + c * x**5
        return x

    return apply


def quintic(M: Tensor) -> Tensor:
    return on_singular_values(M, polynomial(QUINTIC))


def polar(M: Tensor) -> Tensor:
    return on_singular_values(M, lambda s: (s > 1e-9).to(s))


def momentum(G: Tensor, memory: dict[str, Any], mu: float = 0.9, nesterov: bool = True) -> tuple[Tensor, Tensor]:
    """The momentum, and what is mapped."""
    M = memory["M"] = mu * memory.get("M", 0) + (1 - mu) * G
    return M, (mu * M + (1 - mu) * G if nesterov else M)


# ---- the maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_the_maps_act_on_singular_values(shape: tuple[int, int]) -> None:
    M = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m, expected in zip(map_spectrum(M), M, strict=True):
        torch.testing.assert_close(m, quintic(expected), rtol=1e-9, atol=1e-9)
    for m, expected in zip(map_spectrum(M, "exact"), M, strict=True):
        torch.testing.assert_close(m, polar(expected), rtol=1e-9, atol=1e-9)
    for m, expected in zip(map_spectrum(M, "power", power=-0.3), M, strict=True):
        spectrum = on_singular_values(expected, lambda s: s**-0.3)
        torch.testing.assert_close(m, spectrum / spectrum.norm() * min(shape) ** 0.5, rtol=1e-9, atol=1e-9)
    for m, expected in zip(map_spectrum(M, "kaon"), M, strict=True):
        # 4.1 (1 - x²)² x, written out.
        chaotic = on_singular_values(expected, polynomial([(4.1, -8.2, 4.1)] * 5)) / 1.175
        torch.testing.assert_close(m, chaotic, rtol=1e-8, atol=1e-8)


def test_polar_express_has_the_coefficients_of_the_paper_and_its_safety_factor() -> None:
    M = torch.randn((1, 5, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def express(s: Tensor) -> Tensor:
        x = s / (1.01 * s.norm())
        for a, b, c in EXPRESS:
            x = a * (x / 1.01) + b * (x / 1.01) ** 3 + c * (x / 1.01) ** 5
        return x

    torch.testing.assert_close(
        map_spectrum(M, "polar_express")[0], on_singular_values(M[0], express), rtol=0, atol=2e-3
    )
    # From where its interval begins, eight steps give the polar factor; Muon's never do.
    values = torch.linspace(1e-2, 1, 9, dtype=torch.float64)
    wide = on_singular_values(torch.randn(9, 12, dtype=torch.float64), lambda s: values).unsqueeze(0)
    torch.testing.assert_close(map_spectrum(wide, "polar_express", 8)[0], polar(wide[0]), rtol=0, atol=1e-9)
    assert (map_spectrum(wide, "quintic", 8)[0] - polar(wide[0])).abs().max() > 0.01


@pytest.mark.parametrize("method", ["quintic", "polar_express", "kaon", "exact", "power"])
def test_a_zero_matrix_stays_zero_and_one_that_is_not_finite_gives_no_error(method: str) -> None:
    matrices = torch.zeros(2, 3, 4)
    matrices[1, 0, 0] = torch.nan
    mapped = map_spectrum(matrices[:1], method, power=-0.5)
    assert (mapped == 0).all()
    assert map_spectrum(matrices[1:], method).isnan().any()


# ---- the rules -------------------------------------------------------------------------------------------------------


def muon(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    _, N = momentum(G, memory)
    return W - 0.01 * (max(1, len(W) / len(W.T)) ** 0.5 * quintic(N) + decay * W)


def normuon(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """Algorithm 1: η̂ = 0.2 η √(mn) / ‖Ô‖, for which the rule has 0.2 √max(m, n) and the polar factor's norm."""
    P = polar(momentum(G, memory)[1])
    v = memory["v"] = 0.8 * memory.get("v", 0) + 0.2 * (P**2).mean(1)
    P_hat = P / (v.sqrt() + 1e-3).unsqueeze(1)
    return W - 0.01 * (0.2 * W.numel() ** 0.5 / P_hat.norm() * P_hat + decay * W)


def adamuon(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """A matrix of signs may have fewer singular values than rows: then √(mn) is √max(m, n) ‖P‖."""
    P = polar(momentum(G, memory)[1].sign())
    V = memory["V"] = 0.8 * memory.get("V", 0) + 0.2 * P**2
    P_hat = P / (V.sqrt() + 1e-3)
    return W - 0.01 * (0.2 * max(W.shape) ** 0.5 * P.norm() / P_hat.norm() * P_hat + decay * W)


def muon_squared(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    _, N = momentum(G, memory)
    V = memory["V"] = 0.8 * memory.get("V", 0) + 0.2 * G**2
    return W - 0.01 * (polar(N / (V.sqrt() + 1e-3)) + decay * W)


def muon_eq(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    N = momentum(G, memory)[1]
    return W - 0.01 * (polar(N / N.norm(dim=1, keepdim=True)) + decay * W)


def muon_eq_columns(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    N = momentum(G, memory)[1]
    return W - 0.01 * (polar(N / N.norm(dim=0, keepdim=True)) + decay * W)


def muon_plus(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    P = polar(momentum(G, memory)[1])
    rows = P / P.norm(dim=1, keepdim=True)
    return W - 0.01 * ((len(W) / len(W.T)) ** 0.5 * rows * (P.norm() / rows.norm()) + decay * W)


def namo(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    M, N = momentum(G, memory)
    v = memory["v"] = 0.8 * memory.get("v", 0) + 0.2 * (G**2).sum()
    alpha = (1 - 0.8**t) ** 0.5 / (1 - 0.9**t) * M.norm() / (v.sqrt() + 1e-3 * (1 - 0.8**t) ** 0.5)
    return W - 0.01 * (alpha * polar(N) + decay * W)


def adago(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    _, N = momentum(G, memory)
    norm = min(float(G.norm()), 0.6)
    memory["v2"] = memory.get("v2", 0.0) + norm**2
    return W - max(0.003, 0.01 * norm / memory["v2"] ** 0.5) * polar(N) - 0.01 * decay * W


def mars_m(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    C = G + 0.2 * 0.9 / 0.1 * (G - memory.get("last", G))
    memory["last"] = G
    _, N = momentum(C / max(1, C.norm()), memory, nesterov=False)
    return W - 0.01 * (0.2 * max(W.shape) ** 0.5 * polar(N) + decay * W)


def pmuon(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    _, N = momentum(G, memory)
    for name, product in (("L", G @ G.T), ("R", G.T @ G)):
        C = memory[name] = 0.8 * memory.get(name, 0) + 0.2 * product
        if (t - 1) % 2 == 0:
            values, vectors = torch.linalg.eigh(C)
            damped = values.clamp_min(0) + 1e-3 * values.max()
            memory[name + "^"] = vectors @ torch.diag(damped**-0.3) @ vectors.T
    return W - 0.01 * (polar(memory["L^"] @ N @ memory["R^"]) + decay * W)


def soap_muon(W: Tensor, G: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    """modded-nanogpt's order: the step first, with the bases of the step before."""
    _, U = momentum(G, memory)
    if t > 1:
        N = memory["QL"].T @ U @ memory["QR"]
        memory["V"] = 0.8 * memory.get("V", torch.zeros_like(G)) + 0.2 * N**2
        U = memory["QL"] @ (N / (memory["V"].sqrt() + 1e-3)) @ memory["QR"].T
    for side, product in (("L", G @ G.T), ("R", G.T @ G)):
        memory[side] = 0.8 * memory.get(side, 0) + 0.2 * product
        if t == 1:
            memory["Q" + side] = torch.linalg.eigh(memory[side]).eigenvectors.flip(1)
    if t > 1 and (t - 1) % 2 == 0:
        left = torch.diagonal(memory["QL"].T @ memory["L"] @ memory["QL"]).argsort(descending=True)
        memory["QL"], memory["V"] = torch.linalg.qr(memory["L"] @ memory["QL"][:, left]).Q, memory["V"][left]
        right = torch.diagonal(memory["QR"].T @ memory["R"] @ memory["QR"]).argsort(descending=True)
        memory["QR"], memory["V"] = torch.linalg.qr(memory["R"] @ memory["QR"][:, right]).Q, memory["V"][:, right]
    return W - 0.01 * (polar(U) + decay * W)


RULES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "muon": (muon, {}),
    "normuon": (normuon, {"after": "row", "scale": "match_rms", "polar": "exact"}),
    "adamuon": (adamuon, {"before": "sign", "after": "elementwise", "scale": "match_rms", "polar": "exact"}),
    "muon_squared": (muon_squared, {"before": "elementwise", "scale": "unit", "polar": "exact"}),
    "muon_eq": (muon_eq, {"before": "row", "scale": "unit", "polar": "exact"}),
    "muon_eq_columns": (muon_eq_columns, {"before": "column", "scale": "unit", "polar": "exact"}),
    "muon_plus": (muon_plus, {"after": "renorm", "scale": "spectral", "polar": "exact"}),
    "namo": (namo, {"after": "scalar", "scale": "unit", "polar": "exact"}),
    "adago": (adago, {"after": "accumulated", "scale": "unit", "polar": "exact", "norm_limit": 0.6, "step_floor": 0.3}),
    "mars_m": (mars_m, {"gamma": 0.2, "nesterov": False, "scale": "match_rms", "polar": "exact"}),
    "pmuon": (pmuon, {"before": "kronecker", "scale": "unit", "polar": "exact"}),
}  # fmt: skip


def make(**options: Any) -> Callable[[Any], SpectralRule]:
    shared = {"lr": 0.01, "momentum": 0.9, "beta2": 0.8, "eps": 1e-3, "precondition_frequency": 2}
    return lambda p: SpectralRule(p, **(shared | options))


@both_decays
@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, decay: float) -> None:
    equations, options = RULES[name]
    assert_parity(
        make(**options, weight_decay=decay), transcription(equations, decay=decay), torch.float64, shapes=SHAPES,
        tolerance=1e-7,
    )  # fmt: skip


@all_dtypes
@pytest.mark.parametrize("name", ["normuon", "mars_m", "adago"])
def test_rules_in_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    equations, options = RULES[name]
    reference = transcription(equations, decay=0.0)
    assert_parity(make(**options), reference, dtype, shapes=((4, 6), (6, 4)), tolerance=1e-7)


def test_soap_muon() -> None:
    """On square matrices: of the longer side some eigenvectors are not unique."""
    options = {"before": "eigenbasis", "scale": "unit", "polar": "exact"}
    reference = transcription(soap_muon, decay=0.0)
    assert_parity(make(**options), reference, torch.float64, shapes=((5, 5), (3, 3), (5, 5)), tolerance=1e-6)


@both_decays
@pytest.mark.parametrize("after", ["none", "row"])
def test_a_fraction_of_the_rows(after: str, decay: float) -> None:
    """NorDion2: the rows of largest momentum move, and only their momentum decays."""

    def nordion2(W: Tensor, G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
        M = memory["M"] = memory.get("M", 0) + G
        rows = sorted(range(len(W)), key=lambda row: -float(M[row].abs().sum()))[: -(-len(W) // 2)]
        P = polar(M[rows])
        memory["M"] = M.clone()
        memory["M"][rows] *= 0.9
        if after == "row":
            v = memory.setdefault("v", torch.zeros(len(W), dtype=W.dtype))
            v[rows] = 0.8 * v[rows] + 0.2 * (P**2).mean(1)
            scaled = P / (v[rows].sqrt() + 1e-3).unsqueeze(1)
            P = scaled * (P.norm() / scaled.norm())
        step = torch.zeros_like(W)
        step[rows] = P
        return W - 0.01 * ((len(W) / len(W.T)) ** 0.5 * step + decay * W)

    options = {"fraction": 0.5, "after": after, "scale": "spectral", "polar": "exact", "weight_decay": decay}
    assert_parity(make(**options), transcription(nordion2), torch.float64, shapes=SHAPES, tolerance=1e-7)


def test_two_averages_begin_where_one_has_arrived() -> None:
    def bi_maxwell(W: Tensor, G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
        if t <= 7:
            M = memory["fast"] = memory["slow"] = 0.9 * memory.get("fast", 0) + 0.1 * G
        else:
            memory["fast"] = 0.7 * memory["fast"] + 0.3 * G
            memory["slow"] = 0.95 * memory["slow"] + 0.05 * G
            M = 0.4 * memory["fast"] + 0.6 * memory["slow"]
        return W - 0.01 * polar(0.9 * M + 0.1 * G)

    options = {"lr": 0.01, "momentum": 0.9, "polar": "exact", "scale": "unit", "fast_slow": (0.7, 0.95)}
    options |= {"slow_weight": 0.6, "mixture_start": 7}
    assert_parity(
        lambda p: TwoEMARule(p, **options), transcription(bi_maxwell), torch.float64, shapes=SHAPES, tolerance=1e-7
    )


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"before": "rows"}, "before=rows: must be one of none, sign, row"),
        ({"after": "rows"}, "after=rows: must be one of none, row"),
        ({"polar": "exakt"}, "polar=exakt: must be one of quintic"),
        ({"scale": "rms"}, "scale=rms: must be one of original"),
        ({"fraction": 0.5, "before": "sign", "after": "scalar"}, "with which before=sign, after=scalar has no meaning"),
        ({"fraction": 0.5, "gamma": 0.1}, "with which gamma=0.1 has no meaning"),
        ({"power": 0.5}, "power=0.5 belongs to polar=power, and polar is quintic"),
    ],
)
def test_a_combination_without_a_meaning_is_refused_before_data_are_loaded(
    values: dict[str, Any], expected: str
) -> None:
    (message,) = check_hyperparameters("submissions.spectral.Spectral", values)
    assert message.startswith("optimizer.hyperparameters: Spectral refuses them: ")
    assert expected in message


def test_decays_of_two_averages_have_a_range() -> None:
    (message,) = check_hyperparameters(f"{TwoEMAMuon.__module__}.TwoEMAMuon", {"fast_slow": [0.9, 1.0]})
    assert "both decays must be in [0, 1)" in message


def test_the_waits_are_those_of_the_slots() -> None:
    assert Spectral.describe_host_waits({"after": "row"}) == ""
    assert "eigendecomposition" in Spectral.describe_host_waits({"before": "kronecker"})
    assert "singular value" in Spectral.describe_host_waits({"polar": "power", "power": 0.2})
