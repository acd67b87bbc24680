from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pytorch_optimizer import SophiaH as LibrarySophiaH
from torch import Tensor, nn

from submissions.sophia import SophiaG, SophiaH, SophiaRule
from tests.submissions.parity import (
    all_dtypes,
    assert_parity,
    both_decays,
    compute_gradients,
    compute_loss,
    submission_optimizer,
)

LR, BETAS, GAMMA, EPS, EVERY = 0.01, (0.96, 0.9), 0.05, 1e-12, 3


class Reference:
    """Algorithm 3 with the estimators of Algorithms 1 and 2; gradients and products are rounded to `dtype`."""

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, decay: float, dtype: torch.dtype) -> None:
        self.parameters, self.kind, self.decay, self.dtype, self.t = list(parameters), kind, decay, dtype, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.h = [torch.zeros_like(p) for p in parameters]
        self.noise = torch.Generator().manual_seed(7)

    def estimates(self) -> list[Tensor]:
        if self.kind == "G":  # of four labels
            sampled = compute_gradients(self.parameters, self.t, labels="sampled")
            return [4 * g.to(self.dtype).double() ** 2 for g in sampled]
        u = [torch.randn(p.shape, generator=self.noise, dtype=self.dtype).double() for p in self.parameters]
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        first = torch.autograd.grad(compute_loss(leaves, self.t), leaves, create_graph=True)
        inner = torch.stack([(g * v).sum() for g, v in zip(first, u, strict=True)]).sum()
        return [v * x.to(self.dtype).double() for v, x in zip(u, torch.autograd.grad(inner, leaves), strict=True)]

    def step(self) -> None:
        new = self.estimates() if self.t % EVERY == 0 else None
        for i, p in enumerate(self.parameters):
            assert p.grad is not None
            self.m[i] = BETAS[0] * self.m[i] + (1 - BETAS[0]) * p.grad
            if new is not None:
                self.h[i] = BETAS[1] * self.h[i] + (1 - BETAS[1]) * new[i]
            theta = p.detach() - LR * self.decay * p.detach()
            ratio = self.m[i] / torch.maximum(GAMMA * self.h[i], torch.tensor(EPS, dtype=torch.float64))
            p.data = theta - LR * ratio.clamp(-1, 1)
        self.t += 1


@both_decays
@all_dtypes
@pytest.mark.parametrize("kind", ["G", "H"])
def test_sophia(kind: str, decay: float, dtype: torch.dtype) -> None:
    cls: Any = SophiaG if kind == "G" else SophiaH
    hyperparameters = {
        "lr": LR,
        "betas": BETAS,
        "gamma": GAMMA,
        "eps": EPS,
        "weight_decay": decay,
        "estimate_every": EVERY,
    }
    assert_parity(
        submission_optimizer(cls, needs=cls.needs, **hyperparameters),
        lambda p: Reference(p, kind, decay, dtype),  # type: ignore[arg-type, return-value]
        dtype,
    )


def test_sophia_h_is_the_librarys_where_gamma_is_1() -> None:
    """The library's SophiaH has no gamma."""
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    rule = SophiaRule([ours], {"lr": LR, "betas": BETAS, "gamma": 1.0, "eps": EPS, "weight_decay": 0.1})
    library = LibrarySophiaH([theirs], lr=LR, betas=BETAS, p=1.0, weight_decay=0.1, eps=EPS, update_period=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, h = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
        ours.grad, theirs.grad, rule.estimates = g.clone(), g.clone(), {ours: h}
        rule.step()
        library.step(hessian=[h])
        assert torch.allclose(ours, theirs, atol=1e-6)
