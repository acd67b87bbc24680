"""MARS, VRGD and AdAdaGrad against float64 transcriptions of their papers, and MARS against pytorch_optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from pytorch_optimizer import MARS as LibraryMARS
from torch import Tensor, nn

from harness.roles import Role
from submissions.adadagrad import AdAdaGrad, AdAdaGradNorm
from submissions.mars import Mars, MarsExact, MarsRule
from submissions.vrgd import VRSGD, VRAdam
from tests.submissions.mixed import AdamW, Log, MixedTraining, assert_close, decays

NO_DECAY = (Role.NORM, Role.BIAS)
STEPS = 25


@pytest.mark.parametrize("kind", ["adamw", "lion"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_mars(kind: str, exact: bool, weight_decay: float) -> None:
    lr, gamma, betas = 0.01, 0.2, (0.9, 0.95)
    training = MixedTraining(
        MarsExact if exact else Mars,
        dict(lr=lr, kind=kind, gamma=gamma, betas=betas, weight_decay=weight_decay, adamw_lr=0.02,
             adamw_betas=(0.9, 0.99), adamw_weight_decay=weight_decay),
        no_decay=NO_DECAY,
    )  # fmt: skip
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    names = list(theta)
    small: Any = defaultdict(lambda: AdamW(0.02, (0.9, 0.99)))
    large: Any = defaultdict(lambda: AdamW(lr, betas))
    m: Any = defaultdict(float)
    kept: dict[str, Tensor] = {}
    corrected = 0
    for t in range(STEPS):
        log = training.step()
        for name, g in log.gradients.items():
            if theta[name].ndim < 2:
                theta[name] = small[name](theta[name], g, decay[name])
                continue
            previous = log.calls["gradients"][0][names.index(name)] if exact else kept.get(name, g)
            assert t > 0 or torch.equal(previous, g)
            c = g + gamma * betas[0] / (1 - betas[0]) * (g - previous)
            corrected += int(not torch.allclose(c, g))
            c = c / max(1.0, float(c.norm()))
            kept[name] = g
            if kind == "adamw":
                theta[name] = large[name](theta[name], c, decay[name])
            else:
                m[name] = betas[0] * m[name] + (1 - betas[0]) * c
                theta[name] = theta[name] - lr * (torch.sign(m[name]) + decay[name] * theta[name])
        assert_close(training, theta, t, 1e-7)
    assert corrected > 100


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_mars_is_the_librarys_after_the_first_step(kind: str) -> None:
    """The library takes g_0 = 0 where the paper has θ_0 = θ_1 and so no correction at the first step; given a first
    gradient of 0 the two agree."""
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    own = dict(lr=0.01, kind=kind, gamma=0.025, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.1)
    rule = MarsRule([ours], own)
    library = LibraryMARS([theirs], lr=0.01, betas=(0.95, 0.99), gamma=0.025, mars_type=kind, weight_decay=0.1)
    torch.manual_seed(0)
    for step in range(25):
        g = torch.zeros(4, 3) if step == 0 else torch.randn(4, 3)
        ours.grad, theirs.grad = g.clone(), g.clone()
        rule.step()
        library.step()
        assert torch.allclose(ours, theirs, atol=1e-5), step


def reference_ratio(log: Log, names: list[str], gamma: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pieces = log.calls["pieces"]
    mean, ratio = {}, {}
    for i, name in enumerate(names):
        g = torch.stack([piece[i] for piece in pieces])
        mean[name] = ratio[name] = g.mean(0)
        if not g.numel():
            continue
        r = mean[name] ** 2 / (g.var(0, unbiased=False) + 1e-300)
        ratio[name] = (r / (r.mean() + 1e-300)).clamp(gamma, 1)
    return mean, ratio


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_vr_sgd(weight_decay: float) -> None:
    lr, gamma, momentum = 0.1, 0.1, 0.9
    training = MixedTraining(
        VRSGD, dict(lr=lr, momentum=momentum, gamma=gamma, pieces=4, weight_decay=weight_decay), no_decay=NO_DECAY
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    names, buffer = list(theta), {name: torch.zeros_like(x) for name, x in theta.items()}
    for t in range(STEPS):
        log = training.step()
        assert len(log.calls["pieces"]) == 4
        mean, ratio = reference_ratio(log, names, gamma)
        for name in names:
            buffer[name] = momentum * buffer[name] + ratio[name] * mean[name] + decay[name] * theta[name]
            theta[name] = theta[name] - lr * buffer[name]
        assert_close(training, theta, t, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_vr_adam(weight_decay: float) -> None:
    lr, gamma, beta3 = 0.01, 0.1, 0.8
    training = MixedTraining(
        VRAdam, dict(lr=lr, gamma=gamma, beta3=beta3, pieces=8, weight_decay=weight_decay), no_decay=NO_DECAY
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    names, p = list(theta), {name: torch.zeros_like(x) for name, x in theta.items()}
    adam: Any = defaultdict(lambda: AdamW(lr, (0.9, 0.999)))
    for t in range(1, STEPS + 1):
        mean, ratio = reference_ratio(training.step(), names, gamma)
        for name in names:
            p[name] = beta3 * p[name] + (1 - beta3) * ratio[name]
            theta[name] = adam[name](theta[name], p[name] / (1 - beta3**t) * mean[name], decay[name])
        assert_close(training, theta, t, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("norm", [False, True])
def test_adadagrad(norm: bool, weight_decay: float) -> None:
    lr, eta, eps = (1.0 if norm else 0.05), 2.0, 1e-10
    training = MixedTraining(
        AdAdaGradNorm if norm else AdAdaGrad,
        dict(lr=lr, eta=eta, eps=eps, initial_batch=0.5, max_batch=3.0, pieces=4, weight_decay=weight_decay),
        no_decay=NO_DECAY,
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    names, total, batch = list(theta), defaultdict(float), 8
    batches = []
    for t in range(STEPS):
        log = training.step()
        assert log.batch_size == batch
        batches.append(batch)
        pieces = log.calls["pieces"]
        stacked = [torch.stack([piece[i] for piece in pieces]) for i in range(len(names))]
        mean = {name: g.mean(0) for name, g in zip(names, stacked, strict=True)}
        variance = sum(float(g.var(0, unbiased=True).sum()) for g in stacked if g.numel()) * batch / len(pieces)
        wanted = math.ceil(variance / (eta**2 * sum(float((g**2).sum()) for g in mean.values())) / 4) * 4
        batch = min(48, max(batch, wanted))
        gradients = {name: mean[name] + decay[name] * theta[name] for name in names}
        squares = sum(float((g**2).sum()) for g in gradients.values())
        for name, g in gradients.items():
            total[name] = total[name] + (squares if norm else g**2)
            root = total[name] ** 0.5
            theta[name] = theta[name] - lr * g / (root + eps)
        assert_close(training, theta, t, 1e-6)
    assert len(set(batches)) > 2


def test_errors_name_key_value_and_fix() -> None:
    for cls, arguments, message in (
        (Mars, {"kind": "sgd"}, "kind=sgd: must be adamw or lion"),
        (VRAdam, {"pieces": 1}, "pieces=1: must be at least 2"),
        (VRSGD, {"gamma": 0.0}, r"gamma=0.0: must lie in \(0, 1\]"),
        (AdAdaGrad, {"eta": 0.0}, "eta=0.0: must be above 0"),
        (AdAdaGrad, {"initial_batch": 5.0}, "initial_batch=5.0: must lie above 0 and not above max_batch=4.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MixedTraining(cls, arguments)
