from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.adahessian import AdaHessian, average_kernels
from tests.submissions.parity import ParityContext, assert_parity, make_parameters, submission_optimizer

SHAPES = ((4, 6), (5,), (2, 3, 3, 3))


@pytest.mark.parametrize("every", [1, 3])
def test_adahessian(every: int) -> None:
    """The loss is a sum over parameters, so the Hessian's product with all signs is that with each tensor's own."""

    def reference(parameters: Any) -> Any:
        generator = torch.Generator().manual_seed(7)
        memory = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in parameters]
        counts = {"step": 0, "estimates": 0}

        class Stepper:
            def step(self) -> None:
                context = ParityContext(parameters, counts["step"])
                gradients = context.gradients()
                if counts["step"] % every == 0:
                    z = [torch.randint(2, p.shape, generator=generator).double() * 2 - 1 for p in parameters]
                    products = context.hessian_vector_product(z)
                    counts["estimates"] += 1
                    for moments, sign, product in zip(memory, z, products, strict=True):
                        d = (sign * product).abs()
                        if d.ndim == 4:
                            d = d.mean((2, 3), keepdim=True).expand(d.shape)
                        moments["v"] = 0.8 * moments["v"] + 0.2 * d**2
                counts["step"] += 1
                for p, g, moments in zip(parameters, gradients, memory, strict=True):
                    moments["m"] = 0.9 * moments["m"] + 0.1 * g
                    v = moments["v"] / (1 - 0.8 ** counts["estimates"])
                    ratio = moments["m"] / (1 - 0.9 ** counts["step"]) / (v.sqrt() ** 0.7 + 1e-3)
                    p.data = p.data - 0.1 * (ratio + 0.3 * p.data)

        return Stepper()

    ours = submission_optimizer(
        AdaHessian, needs=AdaHessian.needs, lr=0.1, betas=(0.9, 0.8), eps=1e-3, weight_decay=0.3, hessian_power=0.7,
        estimate_every=every,
    )  # fmt: skip
    assert_parity(ours, reference, torch.float64, shapes=SHAPES, tolerance=1e-7)


def test_only_filters_are_averaged() -> None:
    d = torch.arange(12.0).view(1, 3, 2, 2)
    expected = torch.tensor([1.5, 5.5, 9.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.equal(average_kernels(d), expected)
    matrix: Tensor = make_parameters(torch.float32)[0].detach()
    assert average_kernels(matrix) is matrix
