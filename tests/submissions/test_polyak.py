from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Need
from submissions.polyak import ALRSMAG, PSPS, PSPSHutchinson
from tests.submissions.parity import assert_parity, both_decays, compute_loss, make_setup, submission_optimizer

BETA, ALPHA, BOUND = 0.9, 0.1, 0.1
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
# The step size is the cap with the first value, and depends on the loss with the second.
caps = pytest.mark.parametrize("lr", [0.01, 10.0])


class Reference:
    """The equations of the papers, on all parameters; a subclass defines the direction and its squared norm."""

    c = 0.5

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, decay: float) -> None:
        self.parameters, self.lr, self.decay, self.t = list(parameters), lr, decay, 0
        self.memory: list[Any] = [None for _ in parameters]
        self.signs = torch.Generator().manual_seed(7)

    def direction_and_squared_norm(self, g: list[Tensor]) -> tuple[list[Tensor], float]:
        raise NotImplementedError

    def step(self) -> None:
        value = float(compute_loss(self.parameters, self.t).detach())
        direction, squared = self.direction_and_squared_norm(
            [p.grad.clone() for p in self.parameters if p.grad is not None]
        )
        size = min(self.lr, max(value - BOUND, 0.0) / (self.c * squared))
        self.t += 1
        for p, d in zip(self.parameters, direction, strict=True):
            p.data = p.detach() - size * (d + self.decay * p.detach())


class Smag(Reference):
    c = 2.0

    def direction_and_squared_norm(self, g: list[Tensor]) -> tuple[list[Tensor], float]:
        self.memory = [x if m is None else BETA * m + x for m, x in zip(self.memory, g, strict=True)]
        return self.memory, sum(float((d**2).sum()) for d in self.memory)


class Preconditioned(Reference):
    kind = ""

    def diagonal(self, i: int, g: Tensor, product: Tensor) -> Tensor:
        if self.kind == "adam":
            self.memory[i] = BETA * (0 if self.memory[i] is None else self.memory[i]) + (1 - BETA) * g**2
            return (self.memory[i] / (1 - BETA ** (self.t + 1))).sqrt()
        if self.kind == "adagrad":
            self.memory[i] = (0 if self.memory[i] is None else self.memory[i]) + g**2
            return self.memory[i].sqrt()
        self.memory[i] = product if self.memory[i] is None else BETA * self.memory[i] + (1 - BETA) * product
        return self.memory[i]

    def direction_and_squared_norm(self, g: list[Tensor]) -> tuple[list[Tensor], float]:
        z = [torch.randint(0, 2, x.shape, generator=self.signs).mul(2).sub(1).double() for x in g]
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        first = torch.autograd.grad(compute_loss(leaves, self.t), leaves, create_graph=True)
        inner = torch.stack([(a * b).sum() for a, b in zip(first, z, strict=True)]).sum()
        products = [a * b for a, b in zip(z, torch.autograd.grad(inner, leaves), strict=True)]
        B = [self.diagonal(i, x, y).abs().clamp(min=ALPHA) for i, (x, y) in enumerate(zip(g, products, strict=True))]
        return [x / b for x, b in zip(g, B, strict=True)], sum(
            float((x**2 / b).sum()) for x, b in zip(g, B, strict=True)
        )


@both_decays
@caps
@wide_dtypes
def test_alr_smag(lr: float, decay: float, dtype: torch.dtype) -> None:
    hyperparameters = {"lr": lr, "beta": BETA, "c": 2.0, "lower_bound": BOUND, "weight_decay": decay}
    assert_parity(submission_optimizer(ALRSMAG, **hyperparameters), lambda p: Smag(p, lr, decay), dtype)  # type: ignore[arg-type, return-value]


@both_decays
@caps
@wide_dtypes
@pytest.mark.parametrize("kind", ["adam", "adagrad", "hutchinson"])
def test_psps(kind: str, lr: float, decay: float, dtype: torch.dtype) -> None:
    hyperparameters: dict[str, Any] = {"lr": lr, "beta": BETA, "alpha": ALPHA, "c": 0.5, "lower_bound": BOUND}
    cls: Any = PSPSHutchinson if kind == "hutchinson" else PSPS
    hyperparameters |= {"weight_decay": decay} | ({} if kind == "hutchinson" else {"preconditioner": kind})

    def reference(p: Sequence[nn.Parameter]) -> Any:
        preconditioned = Preconditioned(p, lr, decay)
        preconditioned.kind = kind
        return preconditioned

    assert_parity(
        submission_optimizer(cls, needs={Need.SECOND_DERIVATIVES}, **hyperparameters), reference, dtype, tolerance=1e-7
    )


@pytest.mark.parametrize("cls", [ALRSMAG, PSPS, PSPSHutchinson])
def test_bfloat16_parameters_are_rounded_once(cls: Any) -> None:
    """The result is that of float32 for the same weights and gradients, rounded."""
    upcast = nn.Parameter(torch.linspace(-1, 1, 12).bfloat16().float())
    narrow = nn.Parameter(upcast.detach().bfloat16())
    submissions = [cls(make_setup({"p": p}, needs=cls.needs), lr=0.01, weight_decay=0.1) for p in (narrow, upcast)]
    for step in range(20):
        upcast.data.copy_(narrow)
        g = torch.randn(12, generator=torch.Generator().manual_seed(step)).bfloat16()
        for p, submission in zip((narrow, upcast), submissions, strict=True):
            p.grad = g.to(p.dtype)
            submission.rule.loss = 0.7
            if cls is PSPSHutchinson:
                submission.rule.estimates = {p: g.to(p.dtype)}
            submission.optimizers[0].step()
        assert torch.equal(narrow, upcast.bfloat16())


def test_an_unknown_preconditioner_is_refused() -> None:
    with pytest.raises(ValueError, match="preconditioner=hessian: must be adam or adagrad"):
        PSPS(make_setup({"a": nn.Parameter(torch.ones(2))}), preconditioner="hessian")
