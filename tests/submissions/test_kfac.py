from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.interface.roles import parameter_roles
from submissions.kfac import KFAC
from tests.submissions.parity import make_parameters, make_setup

LR, DAMPING, LIMIT, BETA, EXAMPLES = 0.1, 0.01, 0.02, 0.8, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolution(x)).flatten(1)
        return self.head(torch.tanh(self.hidden(self.norm(x))))


class Context:
    """A step on random images in two micro-batches; the drawn labels are other random ones."""

    label_count = EXAMPLES

    def __init__(self, model: Model, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        self.step, self.model = float(t), model
        self.x = torch.randn((EXAMPLES, 1, 4, 4), generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (2, EXAMPLES), generator=generator)

    def run(self, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 4), slice(4, 8)):
            loss = F.cross_entropy(self.model(self.x[part]), labels[part], reduction="sum") / EXAMPLES
            loss.backward()
            total += loss.detach()
        return total

    def backward(self) -> Tensor:
        self.model.zero_grad()
        return self.run(self.y[0])

    def gradients(self, *, labels: str) -> list[Tensor]:
        assert labels == "sampled"
        kept = [p.grad for p in self.model.parameters()]
        self.model.zero_grad()
        self.run(self.y[1])
        factors = [p.grad for p in self.model.parameters()]
        for p, grad in zip(self.model.parameters(), kept, strict=True):
            p.grad = grad
        return [g for g in factors if g is not None]


def factors_by_hand(model: Model, context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """A and S of each layer, position by position, from its inputs and the gradients of its outputs."""
    taken: dict[str, list[Tensor]] = {}
    handles = []
    for name in ("convolution", "hidden", "head"):
        layer = getattr(model, name)

        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            output.retain_grad()
            taken[name] = [inputs[0].detach(), output]

        handles.append(layer.register_forward_hook(hook))
    F.cross_entropy(model(context.x), context.y[1]).backward()
    for handle in handles:
        handle.remove()
    factors = {}
    for name, (inputs, output) in taken.items():
        layer, gradient = getattr(model, name), output.grad
        assert gradient is not None
        if name == "convolution":
            padded = F.pad(inputs, (1, 1, 1, 1))
            places = [(n, i, j) for n in range(EXAMPLES) for i in range(2) for j in range(2)]
            a = torch.stack([padded[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten() for n, i, j in places])
            s = torch.stack([gradient[n, :, i, j] for n, i, j in places])
        else:
            a, s = inputs, gradient
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
        factors[name] = (a.T @ a / len(a), EXAMPLES * s.T @ s)
    return factors


def test_kfac() -> None:
    torch.manual_seed(0)
    model, shadow = Model().double(), Model().double()
    shadow.load_state_dict(model.state_dict())
    named = dict(model.named_parameters())
    setup = make_setup(named, parameter_roles(model), needs=KFAC.needs, model=model)
    submission = KFAC(
        setup, lr=LR, momentum=0.9, weight_decay=0.2, factor_beta=BETA, damping=DAMPING, norm_limit=LIMIT,
        factors_every=2, inverses_every=4, adamw_lr=0.01, adamw_betas=(0.9, 0.99),
    )  # fmt: skip
    adamw = torch.optim.AdamW(shadow.norm.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    A: dict[str, Tensor] = {}
    S: dict[str, Tensor] = {}
    inverses: dict[str, tuple[Tensor, Tensor]] = {}
    M: dict[str, Tensor] = {}
    limited = []
    for t in range(10):
        context: Any = Context(shadow, t)
        if t % 2 == 0:
            for name, (a, s) in factors_by_hand(shadow, context).items():
                A[name] = BETA * A[name] + (1 - BETA) * a if t else a
                S[name] = BETA * S[name] + (1 - BETA) * s if t else s
        if t % 4 == 0:
            for name in A:
                pi = float((A[name].diagonal().mean() / S[name].diagonal().mean()).sqrt())
                inverses[name] = tuple(  # type: ignore[assignment]
                    torch.linalg.inv(m + share * DAMPING**0.5 * torch.eye(len(m), dtype=m.dtype))
                    for m, share in ((A[name], pi), (S[name], 1 / pi))
                )
        context.backward()
        G, U = {}, {}
        for name, (a_inverse, s_inverse) in inverses.items():
            layer = getattr(shadow, name)
            G[name] = layer.weight.grad.flatten(1)
            if layer.bias is not None:
                G[name] = torch.cat([G[name], layer.bias.grad.unsqueeze(1)], 1)
            U[name] = s_inverse @ G[name] @ a_inverse
        total = LR**2 * sum(float((U[name] * G[name]).sum()) for name in U)
        factor = min(1.0, (LIMIT / total) ** 0.5)
        limited.append(factor < 1)
        with torch.no_grad():
            for name, update in U.items():
                layer = getattr(shadow, name)
                M[name] = 0.9 * M.get(name, torch.zeros_like(update)) + LR * factor * update
                columns = layer.weight[0].numel()
                weight = layer.weight.flatten(1)
                layer.weight.copy_((weight - M[name][:, :columns] - LR * 0.2 * weight).view(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias - M[name][:, -1] - LR * 0.2 * layer.bias)
        adamw.step()
        ours: Any = Context(model, t)
        submission.step(ours)
        for name, p in shadow.named_parameters():
            torch.testing.assert_close(named[name].detach(), p.detach(), rtol=1e-5, atol=1e-7)
    assert any(limited) and not all(limited)


def test_without_a_layer_it_is_refused() -> None:
    named = {"w": make_parameters(torch.float32)[0]}
    with pytest.raises(ValueError, match="K-FAC has factors of linear layers and convolutions, and the model has none"):
        KFAC(make_setup(named, needs=KFAC.needs))
