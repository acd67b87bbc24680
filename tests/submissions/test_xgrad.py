from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import OptimizerSubmission, Setup
from submissions.xgrad import XGrad
from tests.submissions.parity import all_dtypes, assert_parity, compute_gradients, submission_optimizer


class Reference:
    """Algorithm 1 of the paper: the prediction from the optimizer's state."""

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, ahead: float, dtype: torch.dtype) -> None:
        self.parameters, self.kind, self.ahead, self.dtype, self.t = list(parameters), kind, ahead, dtype, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def delta(self, i: int) -> Tensor:
        if self.kind == "sgd" or self.t == 0:
            return self.m[i]
        m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.99**self.t)
        return m / (v.sqrt() + 1e-8)

    def step(self) -> None:
        predicted = [p.detach() - self.ahead * 0.01 * self.delta(i) for i, p in enumerate(self.parameters)]
        gradients = [g.to(self.dtype).double() for g in compute_gradients(predicted, self.t)]
        self.t += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            if self.kind == "sgd":
                self.m[i] = 0.9 * self.m[i] + g
            else:
                self.m[i], self.v[i] = 0.9 * self.m[i] + 0.1 * g, 0.99 * self.v[i] + 0.01 * g**2
            p.data = p.detach() - 0.01 * self.delta(i)


@all_dtypes
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("ahead", [1.0, 3.0])
def test_xgrad(kind: str, ahead: float, dtype: torch.dtype) -> None:
    def make(setup: Setup) -> XGrad:
        optimizer: Any = torch.optim.SGD(setup.parameters, lr=0.01, momentum=0.9)
        if kind == "adam":
            optimizer = torch.optim.Adam(setup.parameters, lr=0.01, betas=(0.9, 0.99))
        return XGrad(setup, OptimizerSubmission(setup, [optimizer]), xgrad_steps=ahead)

    # torch's own state is rounded in bfloat16, so that only a run without an error is checked.
    if dtype == torch.bfloat16:
        parameters = [nn.Parameter(torch.ones(4, 6, dtype=dtype))]
        steps = submission_optimizer(make)(parameters)
        for _ in range(25):
            steps.step()
        assert parameters[0].isfinite().all()
        return
    assert_parity(submission_optimizer(make), lambda p: Reference(p, kind, ahead, dtype), dtype)  # type: ignore[arg-type, return-value]


def test_gradients_of_micro_batches_are_predicted_too() -> None:
    seen: list[list[Tensor]] = []

    class Sees(OptimizerSubmission):
        def step(self, ctx: Any) -> None:
            seen.append([gradients[0] for gradients in ctx.micro_batch_gradients()])
            self.update(ctx)

    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    steps = submission_optimizer(lambda setup: XGrad(setup, Sees(setup, [torch.optim.SGD(setup.parameters, lr=0.1)])))(
        [p]
    )
    steps.step()
    before = p.detach().clone()
    steps.step()
    moved = before - torch.ones(3, dtype=torch.float64)
    expected = [compute_gradients([before + moved], 1, slice(k, k + 1))[0] for k in range(4)]
    torch.testing.assert_close(seen[1], expected)
