from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.interface.roles import parameter_roles
from submissions.newton_muon import NewtonMuon
from submissions.spectral import SpectralRule
from tests.submissions.parity import make_parameters, make_setup

EVERY, BETA, DAMPING = 3, 0.8, 0.2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.hidden = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolution(torch.tanh(self.stem(x))))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class Context:
    """A step on two micro-batches of random images."""

    def __init__(self, model: Model, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        self.step, self.model = float(t), model
        self.x = torch.randn((8, 1, 4, 4), generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (8,), generator=generator)

    def backward(self) -> Tensor:
        self.model.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            loss = F.cross_entropy(self.model(self.x[part]), self.y[part])
            loss.backward()
        return loss.detach()


def inputs_of(model: Model, x: Tensor) -> dict[str, Tensor]:
    """Patches [positions, columns] that the filters, and vectors that the rows, are multiplied by, one by one."""
    with torch.no_grad():
        before = F.pad(torch.tanh(model.stem(x)), (1, 1, 1, 1))
        patches = [before[n, :, i : i + 3, j : j + 3].flatten() for n in range(8) for i in (0, 2) for j in (0, 2)]
        return {
            "convolution.weight": torch.stack(patches),
            "hidden.weight": torch.tanh(model.convolution(torch.tanh(model.stem(x)))).flatten(1),
        }


def test_newton_muon() -> None:
    torch.manual_seed(0)
    model = Model().double()
    named = dict(model.named_parameters())
    setup = make_setup(named, parameter_roles(model), needs=NewtonMuon.needs, model=model)
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "polar": "exact", "weight_decay": 0.1}
    submission = NewtonMuon(
        setup, **options, refresh_every=EVERY, input_beta=BETA, input_damping=DAMPING, adamw_lr=0.01
    )
    matrices = ["convolution.weight", "hidden.weight"]
    shadow = {name: nn.Parameter(named[name].detach().flatten(1).clone()) for name in matrices}
    rule = SpectralRule(shadow.values(), **options)
    K = {name: 1e-3 * torch.eye(p.shape[1], dtype=torch.float64) for name, p in shadow.items()}
    P = {name: torch.eye(p.shape[1], dtype=torch.float64) for name, p in shadow.items()}
    for t in range(1, 11):
        context: Any = Context(model, t)
        context.backward()
        gradients = {name: named[name].grad for name in matrices}
        if t % EVERY == 0:
            for name, Z in inputs_of(model, context.x).items():
                K[name] = BETA * K[name] + (1 - BETA) * Z.T @ Z / len(Z)
                ridge = DAMPING * torch.diagonal(K[name]).mean() * torch.eye(len(K[name]), dtype=torch.float64)
                P[name] = torch.linalg.inv(K[name] + ridge)
        for name, p in shadow.items():
            gradient = gradients[name]
            assert gradient is not None
            p.grad = gradient.flatten(1) @ P[name]
        rule.step()
        submission.step(context)
        for name, p in shadow.items():
            torch.testing.assert_close(named[name].detach().flatten(1), p.detach(), rtol=1e-7, atol=1e-8)


def test_without_a_layer_it_is_refused() -> None:
    named = {"w": make_parameters(torch.float32)[0]}
    with pytest.raises(ValueError, match="the model has no linear layer or convolution of its own"):
        NewtonMuon(make_setup(named, needs=NewtonMuon.needs))
