"""Parity of an update rule with an independent reference, on the gradients of a real loss.

A reference is either another implementation (a function from parameters to an optimizer) or a transcription of the
paper's equations in float64, one step of one parameter, written independently of ours:

    def lion(theta, g, t, memory, lr=0.01, beta1=0.9, beta2=0.97, decay=0.0):
        m = memory.setdefault("m", torch.zeros_like(theta))
        ...
        return new_theta

    def test_lion(decay, dtype):
        assert_parity(lambda p: Lion(p, lr=0.01, ...), transcription(lion, decay=decay), dtype)

In float64 the two must agree to nearly all digits, which also shows where an ε is added; in float32 they must agree to
its rounding. With bfloat16 parameters the reference starts each step from ours, and must agree within one rounding of
the weights.
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
MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]
Equations = Callable[..., Tensor]
"""(theta, g, t, memory, **hyperparameters) -> the new theta; t = 1, 2, ...; memory: a dict of the parameter's own."""

both_decays = pytest.mark.parametrize("decay", [0.0, 0.3])
all_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def make_parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """Parameters of the given shapes, always with the same random values."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_setup(
    named: dict[str, nn.Parameter], roles: dict[str, Role] | None = None, *, no_decay: Iterable[Role] = (),
    needs: Iterable[Need] = (), model: nn.Module | None = None,
) -> Setup:  # fmt: skip
    """The setup of a submission: parameters of these roles (default: hidden matrices), constant schedule, ten steps."""
    roles = roles or {name: Role.HIDDEN_MATRIX for name in named}
    generator = torch.Generator().manual_seed(7)
    return Setup(
        named, 1, Schedule(shape="constant", warmup_fraction=0, horizon_fraction=1), generator, generator, None,
        frozenset(no_decay), frozenset(needs), roles, 10, model or nn.Identity(),
    )  # fmt: skip


def compute_loss(parameters: Sequence[Tensor], step: int, part: slice = slice(None), labels: str = "true") -> Tensor:
    """A logistic regression per parameter on four examples that change from step to step; `part` of them.

    labels: "sampled" are other random labels. Drawing them from the model is the harness's task.
    """
    generator = torch.Generator().manual_seed(100 + step)
    label_generator = torch.Generator().manual_seed(200 + step)
    total = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        x = torch.randn((4, p.numel()), generator=generator, dtype=torch.float64)
        y = torch.randint(2, (4,), generator=generator) * 2.0 - 1
        if labels == "sampled":
            y = torch.randint(2, (4,), generator=label_generator) * 2.0 - 1
        total = total + F.softplus(-y * (x @ p.double().flatten()))[part].mean()
    return total


def compute_gradients(
    parameters: Sequence[Tensor], step: int, part: slice = slice(None), labels: str = "true", create_graph: bool = False
) -> list[Tensor]:
    """The gradients of `compute_loss` at the parameters, as a list."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    return list(torch.autograd.grad(compute_loss(leaves, step, part, labels), leaves, create_graph=create_graph))


def backward(parameters: Sequence[nn.Parameter], step: int) -> None:
    """Put the gradients of `compute_loss` into `.grad`."""
    for p in parameters:
        p.grad = None
    compute_loss(parameters, step).backward()


class ParityContext:
    """The step context of a submission on the loss of these tests; stands for harness.interface.StepContext."""

    label_count = batch_size = 4

    def __init__(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        self.parameters, self.step = list(parameters), step

    def backward(self) -> Tensor:
        backward(self.parameters, self.step)
        return compute_loss(self.parameters, self.step).detach()

    def gradients(self, *, params: Sequence[Tensor] | None = None, labels: str = "true") -> list[Tensor]:
        return compute_gradients(self.parameters if params is None else params, self.step, labels=labels)

    def hessian_vector_product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        gradients = torch.autograd.grad(compute_loss(leaves, self.step), leaves, create_graph=True)
        return list(torch.autograd.grad(gradients, leaves, grad_outputs=list(vectors)))

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """One micro-batch per example."""
        self.backward()
        return [compute_gradients(self.parameters, self.step, slice(k, k + 1)) for k in range(4)]


class _Stepper:
    """A reference or a submission as far as `assert_parity` uses an optimizer: something with a step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step


def submission_optimizer(cls: Callable[..., Submission], *, needs: Iterable[Need] = (), **hyperparameters: Any) -> Any:
    """A submission on the loss of these tests, for `assert_parity`."""

    def make(parameters: Sequence[nn.Parameter]) -> _Stepper:
        named = {f"parameter_{k}": p for k, p in enumerate(parameters)}
        submission = cls(make_setup(named, needs=needs), **hyperparameters)
        count = itertools.count()

        def step() -> None:
            context: Any = ParityContext(parameters, next(count))
            submission.step(context)

        return _Stepper(step)

    return make


def transcription(equations: Equations, **hyperparameters: Any) -> Any:
    """A reference in float64 from a paper's equations for one parameter, for `assert_parity`."""

    def make(parameters: Sequence[nn.Parameter]) -> _Stepper:
        memories: list[dict[str, Any]] = [{} for _ in parameters]
        counter = itertools.count(1)

        def step() -> None:
            t = next(counter)
            for p, memory in zip(parameters, memories, strict=True):
                assert p.grad is not None and p.dtype == torch.float64
                theta = p.detach().clone()
                p.data = equations(theta, p.grad.clone(), t, memory, **hyperparameters)

        return _Stepper(step)

    return make


def assert_parity(
    make_ours: MakeOptimizer, make_reference: MakeOptimizer, dtype: torch.dtype, *,
    shapes: Sequence[tuple[int, ...]] = SHAPES, tolerance: float = 1e-9,
) -> None:  # fmt: skip
    """Both start from the same parameters and must agree for STEPS steps; tolerance: relative, in float64."""
    ours = make_parameters(dtype, shapes)
    theirs = [nn.Parameter(p.detach().double().clone()) for p in ours]
    optimizer, reference = make_ours(ours), make_reference(theirs)
    initial = [p.detach().clone() for p in ours]
    for step in range(STEPS):
        backward(ours, step)
        if dtype == torch.bfloat16:
            for p, q in zip(ours, theirs, strict=True):
                q.data.copy_(p.data)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        if dtype == torch.float64:
            backward(theirs, step)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            value, expected = p.detach().double(), q.detach()
            if dtype == torch.float64:
                close = torch.isclose(value, expected, rtol=tolerance, atol=tolerance)
            elif dtype == torch.float32:
                close = torch.isclose(value, expected, rtol=1e-4, atol=2e-5)
            else:
                close = torch.isclose(value, expected, rtol=2**-8 * 1.01, atol=1e-5)
            assert close.all(), f"step {step}, shape {tuple(p.shape)}: {(value - expected).abs().max()} apart"
    assert all(not torch.equal(p, b) for p, b in zip(ours, initial, strict=True) if p.numel()), (
        "a parameter never moved"
    )
