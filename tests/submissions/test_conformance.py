"""Every shipped submission conforms; and what each check is for, on submissions with one fault each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim.optimizer import ParamsT

from harness import conformance
from harness.choices import choices
from harness.needs import Need
from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup


@pytest.mark.parametrize("name", [name for name in choices("optimizer") if name != "any"])
def test_conforms(name: str) -> None:
    assert conformance.failures(conformance.subject(name)) == {}


class _Sgd(OptimizerSubmission):
    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, [torch.optim.SGD(setup.parameters, lr=lr)])


class Ascends(_Sgd):
    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        OptimizerSubmission.__init__(self, setup, [torch.optim.SGD(setup.parameters, lr=lr, maximize=True)])


class DecaysAll(_Sgd):
    def update(self, ctx: StepContext) -> None:
        super().update(ctx)
        with torch.no_grad():
            torch._foreach_mul_(self.setup.parameters, 0.999)


class Counting(_Sgd):
    counter = itertools.count()

    def update(self, ctx: StepContext) -> None:
        super().update(ctx)
        with torch.no_grad():
            self.setup.parameters[0].mul_(1 - 1e-4 * next(Counting.counter))


class Forgets(_Sgd):
    momentum: torch.Tensor | None = None

    def update(self, ctx: StepContext) -> None:
        p = self.setup.parameters[0]
        assert p.grad is not None
        self.momentum = p.grad.clone() if self.momentum is None else self.momentum * 0.9 + p.grad
        p.grad = self.momentum.clone()
        super().update(ctx)


class LeavesATrace(_Sgd):
    needs = frozenset({Need.EVALUATION_WEIGHTS})

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with torch.no_grad():
            self.setup.parameters[0].mul_(0.99)
            yield
            self.setup.parameters[0].div_(0.99)


class KeepsGradients(_Sgd):
    last: Any = None

    def update(self, ctx: StepContext) -> None:
        super().update(ctx)
        self.last = self.setup.parameters[0].grad


class Unbounded(_Sgd):
    def __init__(self, setup: Setup, *, lr: float = 0.1, friction: float = 0.5) -> None:
        super().__init__(setup, lr=lr)


class WideState(torch.optim.Optimizer):
    """Momentum in float32, which Optimizer.load_state_dict casts to the parameter's dtype."""

    def __init__(self, params: ParamsT, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros(p.shape))
                    momentum.mul_(0.9).add_(p.grad)
                    p.sub_((group["lr"] * momentum).to(p.dtype))


@pytest.mark.parametrize(
    ("fault", "check", "remedy"),
    [
        (Ascends, "trains", "its sign"),
        (DecaysAll, "parameters", "skip parameters whose .grad is None"),
        (WideState, "bfloat16", "load_state_dict casts"),
        (Counting, "deterministic", "setup.generator"),
        (Forgets, "resumes", "into state_dict"),
        (Forgets, "counts_state", "state_tensors"),
        (LeavesATrace, "evaluates", "swapped"),
        (KeepsGradients, "frees", "holds on to gradients"),
        (Unbounded, "refuses", "friction=-1.0 is accepted"),
    ],
)
def test_a_fault_is_found_and_says_what_to_do(fault: type, check: str, remedy: str) -> None:
    subject = conformance.subject("any", f"optimizer.class_path={__name__}.{fault.__name__}")
    with pytest.raises(conformance.Failed, match=remedy):
        conformance.CHECKS[check](subject)
