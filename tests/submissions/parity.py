"""Parity of an update rule with an independent reference, on the gradients of a real loss.

A reference is either another implementation (a function from parameters to an optimizer) or a transcription of the
paper's equations in float64, one step of one parameter, written apart from ours:

    def lion(theta, g, t, memory, lr=0.01, beta1=0.9, beta2=0.97, decay=0.0):
        m = memory.setdefault("m", torch.zeros_like(theta))
        ...
        return new_theta

    def test_lion(decay, dtype):
        follows(lambda p: Lion(p, lr=0.01, ...), transcribed(lion, decay=decay), dtype)

In float64 the two must agree to nearly all digits, which shows where an ε stands; in float32 to its rounding. With
bfloat16 parameters the reference starts each step from ours, and must agree within one rounding of the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.interface import Need, Role, Schedule, Setup, Submission

SHAPES: tuple[tuple[int, ...], ...] = ((4, 6), (6, 4), (5,), (), (2, 3, 3, 3), (0,))
STEPS = 25
Make = Callable[[Sequence[nn.Parameter]], Optimizer]
Step = Callable[..., Tensor]

both_decays = pytest.mark.parametrize("decay", [0.0, 0.3])
all_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def start(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def setup_of(
    named: dict[str, nn.Parameter], roles: dict[str, Role] | None = None, *, no_decay: Iterable[Role] = (),
    needs: Iterable[Need] = (), model: nn.Module | None = None,
) -> Setup:  # fmt: skip
    """What a submission is built on: parameters of these roles (default: hidden matrices), a constant schedule."""
    roles = roles or {name: Role.HIDDEN_MATRIX for name in named}
    generator = torch.Generator().manual_seed(7)
    return Setup(
        named, 1, Schedule(shape="constant", warmup_fraction=0, horizon_fraction=1), generator, generator, None,
        frozenset(no_decay), frozenset(needs), roles, 10, model or nn.Identity(),
    )  # fmt: skip


def loss(parameters: Sequence[Tensor], step: int, part: slice = slice(None), labels: str = "true") -> Tensor:
    """A logistic regression per parameter on four examples that change from step to step; `part` of them. Labels
    "sampled" are other ones, drawn from nothing: it is for the harness to draw them from the model."""
    generator = torch.Generator().manual_seed(100 + step)
    others = torch.Generator().manual_seed(200 + step)
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        x = torch.randn((4, p.numel()), generator=generator, dtype=torch.float64)
        y = torch.randint(2, (4,), generator=generator) * 2.0 - 1
        if labels == "sampled":
            y = torch.randint(2, (4,), generator=others) * 2.0 - 1
        total = total + F.softplus(-y * (x @ p.double().flatten()))[part].mean()
    return total


def gradients(
    parameters: Sequence[Tensor], step: int, part: slice = slice(None), labels: str = "true", create_graph: bool = False
) -> list[Tensor]:
    here = [p.detach().requires_grad_() for p in parameters]
    return list(torch.autograd.grad(loss(here, step, part, labels), here, create_graph=create_graph))


class Asked:
    """What a submission asks of its step, on the loss of these tests: stands for harness.interface.step.StepContext."""

    label_count = batch_size = 4

    def __init__(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        self.parameters, self.step = list(parameters), step

    def backward(self) -> Tensor:
        backward(self.parameters, self.step)
        return loss(self.parameters, self.step).detach()

    def gradients(self, *, params: Sequence[Tensor] | None = None, labels: str = "true") -> list[Tensor]:
        return gradients(self.parameters if params is None else params, self.step, labels=labels)

    def hessian_vector_product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        here = [p.detach().requires_grad_() for p in self.parameters]
        first = torch.autograd.grad(loss(here, self.step), here, create_graph=True)
        return list(torch.autograd.grad(first, here, grad_outputs=list(vectors)))

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """One per example."""
        self.backward()
        return [gradients(self.parameters, self.step, slice(k, k + 1)) for k in range(4)]


class submitted:
    """A submission on the loss of these tests, for `follows`."""

    def __init__(self, cls: Callable[..., Submission], *, needs: Iterable[Need] = (), **hyperparameters: Any) -> None:
        self.cls, self.needs, self.hyperparameters = cls, needs, hyperparameters

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Any:
        named = {f"parameter_{k}": p for k, p in enumerate(parameters)}
        submission = self.cls(setup_of(named, needs=self.needs), **self.hyperparameters)
        count = itertools.count()

        class Steps:
            @staticmethod
            def step() -> None:
                context: Any = Asked(parameters, next(count))
                submission.step(context)

        return Steps()


def backward(parameters: Sequence[nn.Parameter], step: int) -> None:
    for p in parameters:
        p.grad = None
    loss(parameters, step).backward()


class transcribed:
    """An optimizer out of `step(theta, g, t, memory, **hyperparameters)`, in float64."""

    def __init__(self, step: Step, **hyperparameters: Any) -> None:
        self.rule, self.hyperparameters = step, hyperparameters

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Any:
        memories: list[dict[str, Any]] = [{} for _ in parameters]
        count = 0

        class Steps:
            @staticmethod
            def step() -> None:
                nonlocal count
                count += 1
                for p, memory in zip(parameters, memories, strict=True):
                    assert p.grad is not None and p.dtype == torch.float64
                    theta = p.detach().clone()
                    p.data = self.rule(theta, p.grad.clone(), count, memory, **self.hyperparameters)

        return Steps()


def follows(
    ours: Make, reference: Make | transcribed, dtype: torch.dtype, *, shapes: Sequence[tuple[int, ...]] = SHAPES,
    tolerance: float = 1e-9,
) -> None:  # fmt: skip
    """Both start from one point and must stay together for STEPS steps; tolerance: relative, in float64."""
    mine = start(dtype, shapes)
    theirs = [nn.Parameter(p.detach().double().clone()) for p in mine]
    optimizer, other = ours(mine), reference(theirs)
    begin = [p.detach().clone() for p in mine]
    for step in range(STEPS):
        backward(mine, step)
        if dtype == torch.bfloat16:
            for p, q in zip(mine, theirs, strict=True):
                q.data.copy_(p.data)
        for p, q in zip(mine, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        if dtype == torch.float64:
            backward(theirs, step)
        optimizer.step()
        other.step()
        for p, q in zip(mine, theirs, strict=True):
            here, there = p.detach().double(), q.detach()
            if dtype == torch.float64:
                close = torch.isclose(here, there, rtol=tolerance, atol=tolerance)
            elif dtype == torch.float32:
                close = torch.isclose(here, there, rtol=1e-4, atol=2e-5)
            else:
                close = torch.isclose(here, there, rtol=2**-8 * 1.01, atol=1e-5)
            assert close.all(), f"step {step}, shape {tuple(p.shape)}: {(here - there).abs().max()} apart"
    assert all(not torch.equal(p, b) for p, b in zip(mine, begin, strict=True) if p.numel()), "a parameter never moved"
