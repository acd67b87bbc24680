"""Every shipped submission conforms; and each check finds its fault, shown on submissions with one fault each."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Le
from torch import Tensor

from harness.config import hyperparameters
from harness.config.choices import TEMPLATES, list_choices
from harness.errors import CheckFailed
from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from harness.trial import conformance


@pytest.mark.xdist_group("submissions")
@pytest.mark.parametrize("name", [name for name in list_choices("optimizer") if name not in TEMPLATES])
def test_conforms(name: str) -> None:
    # One of the checks collects garbage, and need not look through what was there before.
    gc.freeze()
    subject = conformance.make_subject(name)
    assert conformance.run_checks(subject) == {}
    options = subject.run.optimizer
    ours = [path for path in (options.class_path, *options.wrappers) if path.startswith("submissions.")]
    for cls in (hyperparameters.import_class(path, "") for path in ours):
        for known, parameter in hyperparameters.signature_hyperparameters(cls).items():
            numeric = isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)
            ranged = hyperparameters.range_name(known) or known in hyperparameters.annotated_ranges(cls)
            assert ranged or not numeric, f"{cls.__name__}.{known} has no range; annotate one"


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
            torch._foreach_mul_(self.setup.parameters, 0.3)
            yield
            torch._foreach_div_(self.setup.parameters, 0.3)


class KeepsGradients(_Sgd):
    last: Any = None

    def update(self, ctx: StepContext) -> None:
        super().update(ctx)
        self.last = self.setup.parameters[0].grad


class Unbounded(_Sgd):
    def __init__(self, setup: Setup, *, lr: float = 0.1, beta: Annotated[float, Le(1)] = 0.5) -> None:
        super().__init__(setup, lr=lr)


class NarrowsOnLoading(_Sgd):
    """Momentum in float32, loaded in the parameter's dtype."""

    momentum: list[Tensor]

    def update(self, ctx: StepContext) -> None:
        gradients = [torch.zeros(p.shape) if p.grad is None else p.grad.float() for p in self.setup.parameters]
        self.momentum = [0.9 * m + g for m, g in zip(getattr(self, "momentum", gradients), gradients, strict=True)]
        for p, m in zip(self.setup.parameters, self.momentum, strict=True):
            p.grad = m.to(p.dtype)
        super().update(ctx)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.momentum = [m.to(p.dtype) for m, p in zip(state["momentum"], self.setup.parameters, strict=True)]


@pytest.mark.parametrize(
    ("fault", "check", "remedy"),
    [
        (Ascends, "trains", "its sign"),
        (DecaysAll, "parameters", "skip parameters whose .grad is None"),
        (NarrowsOnLoading, "bfloat16", "keep the dtype"),
        (Counting, "deterministic", "setup.generator"),
        (Forgets, "resumes", "into state_dict"),
        (Forgets, "counts_state", "state_tensors"),
        (LeavesATrace, "evaluates", "swapped"),
        (KeepsGradients, "frees", "holds on to gradients"),
        (Unbounded, "refuses", "beta=-1.0 is accepted"),
    ],
)
def test_a_fault_is_reported_with_its_remedy(fault: type, check: str, remedy: str) -> None:
    subject = conformance.make_subject("any", f"optimizer.class_path={__name__}.{fault.__name__}")
    with pytest.raises(CheckFailed, match=remedy):
        conformance.CHECKS[check](subject)
