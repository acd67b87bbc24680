"""Lookahead: Zhang, Lucas, Hinton & Ba 2019, "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610,
Algorithm 1. A wrapper around any submission, whose weights θ are the fast ones:

    every k steps:    φ ← φ + α (θ - φ),   θ ← φ

The slow weights φ are evaluated. The state of the inner submission is kept when its weights are reset. One state tensor
per parameter. Defaults (paper): k = 5, α = 0.5 (0.8 and k = 10 as alternatives).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import PositiveInt
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, Wrapper, swapped


class Lookahead(Wrapper):
    """Lookahead as in the module docstring. lookahead_steps: k. lookahead_alpha: α."""

    needs = frozenset({Need.EVALUATION_WEIGHTS})

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        lookahead_steps: PositiveInt = 5,
        lookahead_alpha: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    ) -> None:
        super().__init__(setup, inner)
        self.steps, self.alpha, self.count = lookahead_steps, lookahead_alpha, 0
        self.slow = [p.detach().clone() for p in setup.parameters]

    @override
    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self.count += 1
        if self.count % self.steps == 0:
            # Aliases of the parameters: the copy below resets the weights themselves.
            fast = [p.detach() for p in self.setup.parameters]
            torch._foreach_lerp_(self.slow, fast, self.alpha)
            torch._foreach_copy_(fast, self.slow)

    @override
    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with swapped(self.setup.parameters, self.slow):
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"slow": self.slow, "count": self.count}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.slow, self.count = state["slow"], state["count"]
