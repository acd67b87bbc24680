from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.interface import Role
from harness.interface.roles import parameter_roles
from submissions.adafisher import AdaFisher
from tests.submissions.parity import both_decays, make_setup

LR, BETA, GAMMAS, DAMPING, EVERY, STEPS = 1e-3, 0.9, (0.92, 0.008), 1e-3, 4, 25
EXAMPLES = 16


class Model(nn.Module):
    """A layer of every kind that has factors, a scalar, and a matrix that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(5, 16))
        self.convolution = nn.Conv2d(4, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.hidden = nn.Linear(24, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.embedding).view(-1, 4, 2, 2)
        x = torch.tanh(self.plain(torch.tanh(self.batch_norm(self.convolution(x)))))
        return self.head(self.layer_norm(torch.tanh(self.hidden(x.flatten(1))))) * self.scale


class Context:
    """A step context on random images and labels."""

    step = 0.0

    def __init__(self, model: Model, t: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(t)
        self.model, self.x = model, torch.randn(EXAMPLES, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(3, (EXAMPLES,), generator=generator)

    def backward(self) -> Tensor:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss.detach()


def make_submission(model: Model, decay: float, **options: Any) -> AdaFisher:
    named = dict(model.named_parameters())
    fisher: dict[str, Any] = {"lr": LR, "beta": BETA, "gammas": GAMMAS, "damping": DAMPING, "update_every": EVERY}
    return AdaFisher(
        make_setup(named, parameter_roles(model), no_decay=[Role.BIAS], needs=AdaFisher.needs, model=model),
        **fisher | {"weight_decay": decay, "adamw_lr": 0.01, "adamw_weight_decay": decay} | options,
    )


class AdamW:
    """AdamW's equations for one parameter."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def __call__(self, theta: Tensor, g: Tensor, decay: float) -> Tensor:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        update = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return theta - 0.01 * (update + decay * theta)


@both_decays
def test_adafisher_with_factors_from_the_layers(decay: float) -> None:
    """The expected factors are computed from the inputs and output gradients that hooks of the test collect."""
    torch.manual_seed(0)
    model = Model().double()
    optimizer = make_submission(model, decay)
    layers = {name: m for name, m in model.named_modules() if name and not list(m.children())}
    seen: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():

        def hook(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            seen[name] = [inputs[0].detach()]
            output.register_hook(lambda s: seen[name].append(s.detach()))

        layer.register_forward_hook(hook)

    def normalised(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min() + 1e-12)

    def new_factors(name: str) -> tuple[Tensor, Tensor]:
        layer, (h, s) = layers[name], seen[name]
        if isinstance(layer, nn.Conv2d):
            h = F.unfold(h, 3, padding=1).movedim(1, 2).reshape(-1, layer.weight[0].numel())
            s = s.movedim(1, -1).reshape(-1, s.shape[1])
        if isinstance(layer, nn.Linear | nn.Conv2d):
            h = torch.cat([h, torch.ones(len(h), int(layer.bias is not None), dtype=h.dtype)], 1)
            return torch.stack([row**2 for row in h]).mean(0), torch.stack([row**2 for row in s]).mean(0)
        if isinstance(layer, nn.BatchNorm2d):  # images of 2 by 2
            mean, s = h.sum((0, 2, 3)) / 4**2, s.sum((0, 2, 3))
        else:
            mean, s = h.sum(0), s.sum(0)
        H = torch.stack([(mean**2).sum(), torch.tensor(float(len(mean)), dtype=h.dtype)]) / EXAMPLES**2
        return H, s**2 / EXAMPLES

    H = {name: torch.ones(1, dtype=torch.float64) for name in layers}
    S = {name: torch.ones(1, dtype=torch.float64) for name in layers}
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam: Any = defaultdict(AdamW)
    m: Any = defaultdict(float)
    for t in range(1, STEPS + 1):
        context: Any = Context(model, t, torch.float64)
        optimizer.step(context)
        for name in seen if (t - 1) % EVERY == 0 else ():
            new_H, new_S = new_factors(name)
            H[name] = (1 - GAMMAS[0]) * H[name] + GAMMAS[1] * normalised(new_H)
            S[name] = (1 - GAMMAS[0]) * S[name] + GAMMAS[1] * normalised(new_S)
        for name, p in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            parameter_decay = 0.0 if kind == "bias" else decay
            if p.grad is None:
                assert owner == "unused"
            elif not owner:
                theta[name] = adam[name](theta[name], p.grad, parameter_decay)
            else:
                has_bias = layers[owner].bias is not None
                fisher = S[owner][:, None] * H[owner][None, :] + DAMPING
                fisher = fisher[:, -1:] if kind == "bias" else fisher[:, : -1 if has_bias else None]
                m[name] = BETA * m[name] + (1 - BETA) * p.grad
                update = m[name] / (1 - BETA**t) / fisher.reshape(p.shape)
                theta[name] = theta[name] - LR * (update + parameter_decay * theta[name])
            assert torch.allclose(p.detach(), theta[name], rtol=1e-9, atol=1e-9), (name, t)


def test_factors_of_bfloat16_layers_are_float32() -> None:
    torch.manual_seed(0)
    model = Model().bfloat16()
    optimizer = make_submission(model, 0.1, update_every=1)
    for t in range(STEPS):
        context: Any = Context(model, t, torch.bfloat16)
        optimizer.step(context)
    assert all(f.dtype == torch.float32 and f.isfinite().all() for pair in optimizer.factors.values() for f in pair)
    assert all(p.isfinite().all() for p in model.parameters())


def test_gammas_are_checked() -> None:
    with pytest.raises(ValueError, match=r"gammas=\(0.0, 0.008\): must lie in \(0, 1\]"):
        make_submission(Model(), 0.0, gammas=(0.0, 0.008))
