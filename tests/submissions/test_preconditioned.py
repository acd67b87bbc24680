"""Preconditioned and second-order rules against float64 transcriptions of their papers, one parameter at a time, on the
gradients of a training; and PSGD-Kron and Sophia-H against pytorch_optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer import Kron
from pytorch_optimizer import SophiaH as LibrarySophiaH
from torch import Tensor, nn

from harness.roles import Role
from submissions.adafisher import AdaFisher
from submissions.mfac import MFAC
from submissions.psgd_kron import KronRule, PSGDKron, _balance, update_probability
from submissions.shampoo import Shampoo
from submissions.soap import SOAP
from submissions.sophia import SophiaG, SophiaH, SophiaRule
from tests.submissions.mixed import AdamW, MixedTraining, assert_close, decays

NO_DECAY = (Role.NORM, Role.BIAS)
MATRICES = {Role.HIDDEN_MATRIX, Role.CONVOLUTION}
STEPS = 25


def matrices(training: MixedTraining) -> set[str]:
    return {name for name, role in training.roles.items() if role in MATRICES}


def as_matrix(tensor: Tensor) -> Tensor:
    """Filters [out, in, h, w] with the columns in the order of channels_last."""
    return tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1) if tensor.ndim == 4 else tensor


def from_matrix(matrix: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 2:
        return matrix
    out, channels, height, width = like.shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_soap_is_adam_in_a_slowly_turning_eigenbasis(weight_decay: float) -> None:
    lr, betas, eps, frequency = 0.01, (0.9, 0.95), 1e-8, 5
    training = MixedTraining(
        SOAP, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, precondition_frequency=frequency),
        no_decay=NO_DECAY,
    )  # fmt: skip
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    adam: Any = defaultdict(lambda: AdamW(lr, betas, eps))
    state: dict[str, Any] = {}
    names = {parameter: name for name, parameter in training.names.items()}
    views = {names[parameter]: view for view, parameter, _ in training.submission._views}
    for t in range(STEPS):
        log = training.step()
        for name, g in log.gradients.items():
            if name not in matrices(training):
                theta[name] = adam[name](theta[name], g, decay[name])
                continue
            G = as_matrix(g)
            theta[name] = (1 - lr * decay[name]) * theta[name]
            # Where L or R is singular its eigenvectors and its QR factors are not unique: the reference takes ours,
            # after it has seen that they are such factors.
            held = training.submission.optimizers[0].state[views[name]]
            if name not in state:
                L, R = (1 - betas[1]) * G @ G.T, (1 - betas[1]) * G.T @ G
                QL, QR = held["basis_0"].clone(), held["basis_1"].clone()
                for P, Q in ((L, QL), (R, QR)):
                    assert torch.allclose(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype))
                    values = torch.linalg.eigvalsh(P).flip(0)
                    assert torch.allclose(Q.T @ P @ Q, torch.diag(values), atol=1e-12)
                state[name] = dict(L=L, R=R, QL=QL, QR=QR, M=torch.zeros_like(G), V=torch.zeros_like(G))
                continue
            s = state[name]
            s["M"] = betas[0] * s["M"] + (1 - betas[0]) * G
            rotated = s["QL"].T @ G @ s["QR"]
            s["V"] = betas[1] * s["V"] + (1 - betas[1]) * rotated**2
            M, V = s["M"] / (1 - betas[0] ** t), s["V"] / (1 - betas[1] ** t)
            N = (s["QL"].T @ M @ s["QR"]) / (V.sqrt() + eps)
            theta[name] = theta[name] - lr * from_matrix(s["QL"] @ N @ s["QR"].T, theta[name])
            s["L"] = betas[1] * s["L"] + (1 - betas[1]) * G @ G.T
            s["R"] = betas[1] * s["R"] + (1 - betas[1]) * G.T @ G
            if t % frequency == 0:
                left = torch.diagonal(s["QL"].T @ s["L"] @ s["QL"]).argsort(descending=True)
                right = torch.diagonal(s["QR"].T @ s["R"] @ s["QR"]).argsort(descending=True)
                s["V"] = s["V"][left][:, right]
                for P, Q, order, new in (("L", "QL", left, "basis_0"), ("R", "QR", right, "basis_1")):
                    triangle = held[new].T @ s[P] @ s[Q][:, order]
                    assert torch.allclose(triangle, triangle.triu(), atol=1e-12)
                    assert torch.allclose(held[new].T @ held[new], torch.eye(len(triangle), dtype=G.dtype))
                    s[Q] = held[new].clone()
        assert_close(training, theta, t, 1e-6)


def test_soap_leaves_long_sides_alone() -> None:
    """With no side short enough it is Adam from the second step on."""
    training = MixedTraining(SOAP, dict(lr=0.01, max_precondition_dim=1, weight_decay=0.0))
    theta = training.parameters()
    adam: Any = defaultdict(lambda: AdamW(0.01, (0.95, 0.95)))
    for t in range(STEPS):
        for name, g in training.step().gradients.items():
            if t > 0 or name not in matrices(training):
                theta[name] = adam[name](theta[name], g, 0.0)
        assert_close(training, theta, t)


@pytest.mark.parametrize(("weight_decay", "block"), [(0.0, 1024), (0.3, 5)])
def test_shampoo_with_blocks_delayed_roots_and_grafting(weight_decay: float, block: int) -> None:
    lr, betas, eps, start, frequency = 0.01, (0.9, 0.95), 1e-6, 3, 4
    training = MixedTraining(
        Shampoo,
        dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, precondition_frequency=frequency,
             start_step=start, block_size=block),
        no_decay=NO_DECAY,
    )  # fmt: skip
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    adam: Any = defaultdict(lambda: AdamW(lr, betas))
    state: Any = defaultdict(dict)

    def root(C: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(C)
        values = values - min(float(values.min()), 0.0) + eps
        return vectors @ torch.diag(values**-0.25) @ vectors.T

    for t in range(1, STEPS + 1):
        for name, g in training.step().gradients.items():
            if name not in matrices(training):
                theta[name] = adam[name](theta[name], g, decay[name])
                continue
            G, direction = as_matrix(g), torch.zeros_like(as_matrix(g))
            for i in range(0, G.shape[0], block):
                for j in range(0, G.shape[1], block):
                    key, piece = (name, i, j), G[i : i + block, j : j + block]
                    s = state[key]
                    grafted = adam[key].direction(piece)
                    s["L"] = betas[1] * s.get("L", 0) + (1 - betas[1]) * piece @ piece.T
                    s["R"] = betas[1] * s.get("R", 0) + (1 - betas[1]) * piece.T @ piece
                    update = grafted
                    if t > start:
                        if (t - start - 1) % frequency == 0:
                            correction = 1 - betas[1] ** t
                            s["roots"] = root(s["L"] / correction), root(s["R"] / correction)
                        P = s["roots"][0] @ adam[key].m @ s["roots"][1]
                        update = P * grafted.norm() / P.norm()
                    direction[i : i + block, j : j + block] = update
            theta[name] = (1 - lr * decay[name]) * theta[name] - lr * from_matrix(direction, theta[name])
        assert_close(training, theta, t, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 6), (6, 1)])
def test_kron_follows_the_library(weight_decay: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise. The library balances the factors at random, so that is switched off."""
    torch.manual_seed(0)
    start, target = torch.randn(shape), torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = dict(lr=0.01, momentum=0.9, weight_decay=weight_decay, precondition_lr=0.1, min_update_probability=0.03,
               max_size_triangular=5)  # fmt: skip
    rule = KronRule([ours], own, torch.Generator().manual_seed(7))
    library = Kron([theirs], lr=0.01, momentum=0.9, weight_decay=weight_decay, balance_prob=0.0, max_size_triangular=5)
    noise = torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: torch.randn(x.shape, generator=noise))
    monkeypatch.setattr(np.random, "random", lambda: 1.0)
    for step in range(30):
        for parameter in (ours, theirs):
            parameter.grad = (parameter.detach() - target) * torch.linspace(0.1, 3, parameter.numel()).view(shape)
        rule.step()
        library.step()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), step


def test_kron_fits_its_factors_less_and_less_often() -> None:
    assert [round(update_probability(n, 0.03), 4) for n in (0, 500, 1500, 9000)] == [1.0, 1.0, 0.3679, 0.03]
    parameter = nn.Parameter(torch.eye(2))
    own = dict(lr=0.0, momentum=0.9, weight_decay=0.0, precondition_lr=0.1, min_update_probability=0.03,
               max_size_triangular=8)  # fmt: skip
    rule = KronRule([parameter], own, torch.Generator().manual_seed(0))
    rule.param_groups[0]["step"] = 9000
    fits = []
    for step in range(100):
        parameter.grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(step))
        rule.step()
        fits.append(rule.param_groups[0]["fits"])
    assert fits.index(1) == 33 and fits[-1] == 2
    held = rule.state[parameter]
    assert held["factor_0"].isfinite().all() and torch.equal(held["factor_0"], held["factor_0"].triu())


def test_balancing_keeps_the_product_of_the_factors() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 4, 4), 100 * torch.randn(3, 5)
    product = torch.einsum("nij,nk->nijk", left, right)
    _balance(left, right)
    assert torch.allclose(torch.einsum("nij,nk->nijk", left, right), product, rtol=1e-4)
    assert torch.allclose(left.abs().amax((1, 2)), right.abs().amax(1))


def test_kron_claims_matrices_and_leaves_the_rest_to_adamw() -> None:
    training = MixedTraining(PSGDKron, dict(adamw_lr=0.01))
    theta = training.parameters()
    adam: Any = defaultdict(lambda: AdamW(0.01, (0.9, 0.999)))
    for t in range(3):
        for name, g in training.step().gradients.items():
            if name not in matrices(training):
                theta[name] = adam[name](theta[name], g, 0.0)
            else:
                assert not torch.equal(theta[name], training.parameters()[name])
                theta[name] = training.parameters()[name]
        assert_close(training, theta, t)


@pytest.mark.parametrize("kind", ["G", "H"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_sophia_follows_algorithm_3(kind: str, weight_decay: float) -> None:
    lr, betas, gamma, eps, every = 0.01, (0.96, 0.9), 0.05, 1e-12, 3
    training = MixedTraining(
        SophiaG if kind == "G" else SophiaH,
        dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay, estimate_every=every),
        no_decay=NO_DECAY,
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    m = {name: torch.zeros_like(x) for name, x in theta.items()}
    h = {name: torch.zeros_like(x) for name, x in theta.items()}
    for t in range(STEPS):
        log = training.step()
        estimated = "products" in log.calls or "gradients" in log.calls
        assert estimated == (t % every == 0)
        for i, name in enumerate(theta):
            if estimated and kind == "G":  # Algorithm 2, of 16 labels
                h_hat = 16 * log.calls["gradients"][0][i] ** 2
            elif estimated:
                h_hat = log.calls["vectors"][0][i] * log.calls["products"][0][i]
            if estimated:
                h[name] = betas[1] * h[name] + (1 - betas[1]) * h_hat
            if name not in log.gradients:
                continue
            m[name] = betas[0] * m[name] + (1 - betas[0]) * log.gradients[name]
            theta[name] = theta[name] - lr * decay[name] * theta[name]
            ratio = m[name] / torch.maximum(gamma * h[name], torch.tensor(eps, dtype=torch.float64))
            theta[name] = theta[name] - lr * ratio.clamp(-1, 1)
        assert_close(training, theta, t)


def test_sophia_h_is_the_librarys_where_gamma_is_1() -> None:
    """The library's SophiaH has no gamma."""
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    rule = SophiaRule([ours], dict(lr=0.01, betas=(0.96, 0.99), gamma=1.0, eps=1e-12, weight_decay=0.1))
    library = LibrarySophiaH([theirs], lr=0.01, betas=(0.96, 0.99), p=1.0, weight_decay=0.1, eps=1e-12, update_period=1)
    for _ in range(20):
        g, h = torch.randn(4, 3), torch.randn(4, 3)
        ours.grad, theirs.grad = g.clone(), g.clone()
        rule.observe({ours: h})
        rule.step()
        library.step(hessian=[h])
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_adafisher_with_its_factors_taken_from_the_layers() -> None:
    """The factors are computed again from the inputs and output gradients that hooks of the test see."""
    lr, beta, gammas, damping, every, weight_decay = 1e-3, 0.9, (0.92, 0.008), 1e-3, 4, 0.1
    training = MixedTraining(
        AdaFisher,
        dict(lr=lr, beta=beta, gammas=gammas, damping=damping, update_every=every, weight_decay=weight_decay,
             adamw_lr=0.01, adamw_weight_decay=weight_decay),
        no_decay=NO_DECAY,
    )  # fmt: skip
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    adam: Any = defaultdict(lambda: AdamW(0.01, (0.9, 0.999)))
    layers = {name: module for name, module in training.evaluator.model.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm)}  # fmt: skip
    seen: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():

        def hook(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name] = [inputs[0].detach()]
            output.register_hook(lambda s: seen[name].append(s.detach()))

        layer.register_forward_hook(hook)

    def normalised(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min() + 1e-12)

    H = {name: torch.ones(1, dtype=torch.float64) for name in layers}
    S = {name: torch.ones(1, dtype=torch.float64) for name in layers}
    m: Any = defaultdict(float)
    for t in range(1, STEPS + 1):
        log = training.step()
        for name, layer in layers.items():
            if (t - 1) % every:
                continue
            h, s = seen[name]
            if isinstance(layer, nn.Conv2d):
                h = torch.nn.functional.unfold(h, 3, padding=1).movedim(1, 2).reshape(-1, layer.weight[0].numel())
                s = s.movedim(1, -1).reshape(-1, s.shape[1])
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bias = torch.ones(len(h), int(layer.bias is not None), dtype=h.dtype)
                new_H = torch.stack([row**2 for row in torch.cat([h, bias], 1)]).mean(0)
                new_S = torch.stack([row**2 for row in s]).mean(0)
            elif isinstance(layer, nn.BatchNorm2d):  # 16 images of 2 by 2
                mean = h.sum((0, 2, 3)) / 4**2
                new_H = torch.stack([(mean**2).sum(), torch.tensor(float(len(mean)), dtype=h.dtype)]) / 16**2
                new_S = s.sum((0, 2, 3)) ** 2 / 16
            else:
                mean = h.sum(0)
                new_H = torch.stack([(mean**2).sum(), torch.tensor(float(len(mean)), dtype=h.dtype)]) / 16**2
                new_S = s.sum(0) ** 2 / 16
            H[name] = (1 - gammas[0]) * H[name] + gammas[1] * normalised(new_H)
            S[name] = (1 - gammas[0]) * S[name] + gammas[1] * normalised(new_S)
        for name, g in log.gradients.items():
            owner, _, kind = name.rpartition(".")
            if owner not in layers:
                theta[name] = adam[name](theta[name], g, decay[name])
                continue
            has_bias = layers[owner].bias is not None
            fisher = S[owner][:, None] * H[owner][None, :] + damping
            fisher = fisher[:, -1:] if kind == "bias" else fisher[:, : -1 if has_bias else None]
            m[name] = beta * m[name] + (1 - beta) * g
            theta[name] = theta[name] - lr * (
                m[name] / (1 - beta**t) / fisher.reshape(g.shape) + decay[name] * theta[name]
            )
        assert_close(training, theta, t)


@pytest.mark.parametrize(("weight_decay", "momentum"), [(0.0, 0.0), (0.3, 0.9)])
def test_mfac_is_the_inverse_of_the_windows_fisher_matrix(weight_decay: float, momentum: float) -> None:
    lr, window, damping = 1e-3, 6, 1e-3
    training = MixedTraining(
        MFAC, dict(lr=lr, gradients=window, damping=damping, momentum=momentum, weight_decay=weight_decay),
        no_decay=NO_DECAY,
    )  # fmt: skip
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    past: list[Tensor] = []
    buffer = 0.0
    for t in range(STEPS):
        gradients = training.step().gradients
        g = torch.cat([gradients[name].flatten() for name in theta if name in gradients])
        past = [*past, g][-window:]
        fisher = damping * torch.eye(len(g), dtype=g.dtype) + sum(torch.outer(x, x) for x in past) / window
        buffer = momentum * buffer + torch.linalg.solve(fisher, g)
        assert isinstance(buffer, Tensor)
        at = 0
        for name in theta:
            if name in gradients:
                size = theta[name].numel()
                direction = buffer[at : at + size].view(theta[name].shape)
                theta[name] = theta[name] - lr * (direction + decay[name] * theta[name])
                at += size
        assert_close(training, theta, t, 1e-7)


def test_errors_name_key_value_and_fix() -> None:
    for cls, arguments in (
        (SOAP, {"precondition_frequency": 0}), (Shampoo, {"precondition_frequency": 0}),
        (PSGDKron, {"min_update_probability": 0.0}), (SophiaG, {"estimate_every": 0}),
        (AdaFisher, {"update_every": 0}), (MFAC, {"gradients": 0}), (MFAC, {"damping": 0.0}),
    ):  # fmt: skip
        ((key, value),) = arguments.items()
        with pytest.raises(ValueError, match=rf"{key}={value}: must"):
            MixedTraining(cls, arguments)
