from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import ExampleStream
from harness.seeding import TrialSeeds
from submissions.adadagrad import AdAdaGrad, AdAdaGradNorm
from tests.submissions.parity import ParityContext, both_decays, compute_gradients, make_parameters, make_setup

LR, EPS, ETA = 0.05, 1e-10, 0.7


@both_decays
@pytest.mark.parametrize("cls", [AdAdaGrad, AdAdaGradNorm])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str
)
def test_adadagrad(cls: type[Any], decay: float, dtype: torch.dtype, tolerance: float) -> None:
    """Weights and batch sizes equal those of a transcription. With bfloat16 it starts each step from ours."""
    parameters = make_parameters(dtype)
    setup = make_setup({str(k): p for k, p in enumerate(parameters)}, needs=cls.needs)
    object.__setattr__(setup, "nominal_batch", 16)
    submission = cls(setup, lr=LR, eta=ETA, initial_batch=0.5, max_batch=3.0, pieces=4, weight_decay=decay)
    stream, batch, batches = ExampleStream(TrialSeeds(0, 1), 64), 8, []
    theta, total = [p.detach().clone().double() for p in parameters], [torch.zeros(()).double() for _ in parameters]
    for t in range(25):
        if dtype == torch.bfloat16:
            theta = [p.detach().double() for p in parameters]
        size = len(submission.select(stream).indices)
        assert size == batch
        batches.append(size)
        context: Any = ParityContext(parameters, t)
        context.batch_size = size
        gradients = [[g.to(dtype).double() for g in compute_gradients(theta, t, slice(k, k + 1))] for k in range(4)]
        submission.step(context)

        stacked = [torch.stack(list(g)) for g in zip(*gradients, strict=True)]
        mean = [g.mean(0) for g in stacked]
        variance = sum(float(g.var(0, unbiased=True).sum()) for g in stacked if g.numel()) * size / 4
        required = math.ceil(variance / (ETA**2 * sum(float((g**2).sum()) for g in mean)) / 4) * 4
        batch = min(48, max(batch, required))
        g = [m + decay * x for m, x in zip(mean, theta, strict=True)]
        squares: Tensor = torch.stack([(x**2).sum() for x in g]).sum()
        total = [s + (squares if cls is AdAdaGradNorm else x**2) for s, x in zip(total, g, strict=True)]
        theta = [x - LR * d / (s.sqrt() + EPS) for x, d, s in zip(theta, g, total, strict=True)]
        for p, x in zip(parameters, theta, strict=True):
            assert torch.allclose(p.detach().double(), x, rtol=tolerance, atol=tolerance), t
    assert len(set(batches)) > 1


def test_the_batch_starts_within_its_bounds() -> None:
    with pytest.raises(ValueError, match=r"initial_batch=5.0: must not be above max_batch=4.0"):
        AdAdaGrad(make_setup({"a": nn.Parameter(torch.ones(2))}, needs=AdAdaGrad.needs), initial_batch=5.0)
