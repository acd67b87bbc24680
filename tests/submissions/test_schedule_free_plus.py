from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from submissions.schedule_free_plus import ScheduleFreePlus
from tests.submissions.parity import ParityContext, compute_gradients, compute_loss, make_parameters, make_setup

STEPS = 25


def reference(initial: list[Tensor], decay: float, power: float) -> tuple[list[Tensor], list[Tensor]]:
    """x and y after the equations of the paper, all parameters together. The budget is ten steps."""
    x = [p.clone() for p in initial]
    y, z = [p.clone() for p in x], [p.clone() for p in x]
    m, v = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    e, weights, b = 0.0, 0.0, 0.8
    for t in range(1, STEPS + 1):
        loss, g = float(compute_loss(y, t - 1)), compute_gradients(y, t - 1)
        inner = b * sum(float((gi * (zi - xi)).sum()) for gi, zi, xi in zip(g, z, x, strict=True))
        e = 0.7 * e + 0.3 * sum(float(gi.abs().sum()) for gi in g) * math.sqrt(math.pi / 2)
        alpha = 0.5 * max(0.0, loss - 0.1 + inner) / (e / (1 - 0.7**t))
        weights += t**power
        b_next = 0.8 + min(1.0, t / 5) * 0.1
        for k, gi in enumerate(g):
            m[k], v[k] = 0.9 * m[k] + 0.1 * gi, 0.95 * v[k] + 0.05 * gi**2
            direction = m[k] / (1 - 0.9**t) / ((v[k] / (1 - 0.95**t)).sqrt() + 1e-8)
            z[k] = z[k] - alpha**2 * decay * y[k] - alpha * direction
            x[k] = x[k] + t**power / weights * (z[k] - x[k])
            y[k] = b_next * x[k] + (1 - b_next) * z[k]
        b = b_next
    return x, y


@pytest.mark.parametrize(("decay", "power"), [(0.0, 0.0), (0.3, 2.0)])
def test_schedule_free_plus(decay: float, power: float) -> None:
    parameters = make_parameters(torch.float64)
    setup = make_setup({f"parameter_{k}": p for k, p in enumerate(parameters)}, needs=ScheduleFreePlus.needs)
    x, y = reference([p.detach().clone() for p in parameters], decay, power)
    submission = ScheduleFreePlus(
        setup, lr=0.5, betas=(0.9, 0.95), weight_decay=decay, polyak_beta=0.7, mix=(0.8, 0.9), mix_steps=0.5,
        averaging_power=power, lower_bound=0.1,
    )  # fmt: skip
    for step in itertools.islice(itertools.count(), STEPS):
        context: Any = ParityContext(parameters, step)
        submission.step(context)
    torch.testing.assert_close([p.detach() for p in parameters], y, rtol=1e-7, atol=1e-9)
    with submission.evaluation_weights():
        torch.testing.assert_close([p.detach() for p in parameters], x, rtol=1e-7, atol=1e-9)


def test_a_weight_of_the_average_has_a_range() -> None:
    setup = make_setup({"w": make_parameters(torch.float32)[0]}, needs=ScheduleFreePlus.needs)
    with pytest.raises(ValueError, match=r"mix=\(0\.0, 0\.9\): both weights of the average must be in \(0, 1\]"):
        ScheduleFreePlus(setup, mix=(0.0, 0.9))
