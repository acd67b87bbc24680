from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from submissions.lbfgs import OnlineLBFGS
from tests.submissions.parity import ParityContext, compute_gradients, make_parameters, make_setup

SHAPES = ((3, 4), (5,))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_the_two_loops_are_the_bfgs_matrix() -> None:
    """The inverse Hessian approximation as a matrix, updated pair by pair (Nocedal & Wright, equation 6.17)."""
    parameters = make_parameters(torch.float64, SHAPES)
    named = {f"parameter_{k}": p for k, p in enumerate(parameters)}
    submission = OnlineLBFGS(
        make_setup(named, needs=OnlineLBFGS.needs), lr=0.5, weight_decay=0.1, history=3, curvature=0.2, largest_step=2.0
    )
    pairs: list[tuple[Tensor, Tensor]] = []
    for step in range(10):
        theta = [p.detach().clone() for p in parameters]
        g = flat(compute_gradients(theta, step))
        if pairs:
            usable = [(s, y) for s, y in pairs if s @ y > 0]
            H = torch.eye(len(g), dtype=g.dtype) * sum(float(s @ y / (y @ y)) for s, y in usable) / len(usable)
            for s, y in usable:
                rho = 1 / (s @ y)
                left = torch.eye(len(g), dtype=g.dtype) - rho * torch.outer(s, y)
                H = left @ H @ left.T + rho * torch.outer(s, s)
            p = H @ g
        else:
            p = g / g.norm()
        p = p * min(1.0, float(2.0 / p.norm()))
        expected = flat(theta) - 0.5 * (p + 0.1 * flat(theta))
        context: Any = ParityContext(parameters, step)
        submission.step(context)
        torch.testing.assert_close(flat(list(parameters)), expected, rtol=1e-7, atol=1e-9)
        s = flat(list(parameters)) - flat(theta)
        y = flat(compute_gradients(list(parameters), step)) - g + 0.2 * s
        pairs = [*pairs, (s, y)][-3:]


def test_a_pair_without_positive_curvature_counts_for_nothing() -> None:
    parameters = make_parameters(torch.float64, SHAPES)
    named = {f"parameter_{k}": p for k, p in enumerate(parameters)}
    submission = OnlineLBFGS(make_setup(named, needs=OnlineLBFGS.needs), lr=0.5)
    for step in range(2):
        context: Any = ParityContext(parameters, step)
        submission.step(context)
    gradients = compute_gradients(list(parameters), 3)
    alone = submission._direction(gradients)
    submission.steps.append([torch.ones_like(p) for p in parameters])
    submission.changes.append([-torch.ones_like(p) for p in parameters])
    torch.testing.assert_close(submission._direction(gradients), alone)
