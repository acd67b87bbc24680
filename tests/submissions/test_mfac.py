from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from submissions.mfac import MFAC
from tests.submissions.parity import all_dtypes, assert_parity, both_decays

LR, WINDOW, DAMPING = 5e-2, 6, 1e-2


class Reference:
    """The Fisher matrix is formed, with all parameters as one vector, and the linear system is solved."""

    def __init__(self, parameters: Sequence[nn.Parameter], momentum: float, decay: float) -> None:
        self.parameters, self.momentum, self.decay = list(parameters), momentum, decay
        self.past: list[Tensor] = []
        self.buffer: Tensor | float = 0.0

    def step(self) -> None:
        g = torch.cat([(p.grad + self.decay * p.detach()).flatten() for p in self.parameters if p.grad is not None])
        self.past = [*self.past, g][-WINDOW:]
        fisher = DAMPING * torch.eye(len(g), dtype=g.dtype) + sum(torch.outer(x, x) for x in self.past) / WINDOW
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * torch.linalg.solve(fisher, g)
        assert isinstance(self.buffer, Tensor)
        for p, direction in zip(self.parameters, self.buffer.split([p.numel() for p in self.parameters]), strict=True):
            p.data = p.detach() - LR * direction.view(p.shape)


@both_decays
@all_dtypes
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mfac(momentum: float, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: MFAC(p, lr=LR, gradients=WINDOW, damping=DAMPING, momentum=momentum, weight_decay=decay),
        lambda p: Reference(p, momentum, decay),  # type: ignore[arg-type, return-value]
        dtype,
        tolerance=1e-7,
    )


def test_a_missing_gradient_counts_as_zero() -> None:
    def run(missing: Tensor | None) -> Tensor:
        always, sometimes = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        rule = MFAC([always, sometimes], lr=LR, gradients=2, damping=DAMPING)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            always.grad, sometimes.grad = torch.randn(3, generator=generator), torch.randn(2, generator=generator)
            if step in (2, 3):
                sometimes.grad = missing
            rule.step()
        return always.detach()

    assert torch.allclose(run(None), run(torch.zeros(2)))
