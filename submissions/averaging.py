"""Averages of the iterates, around any submission. The average is evaluated; training continues from the last iterate.
After step t = 1, 2, ... with the weights θ, the average is θ̄ ← (1 - c) θ̄ + c θ with

    ExponentialAverage    c = max(1 - decay, 1 / t^power)            the first iterates are forgotten
    PolynomialAverage     c = (1 + γ) / (t + γ)                      Shamir & Zhang 2013, arXiv:1212.1824
    TailAverage           every `swa_every` steps after `swa_start` of the budget, c = 1 / n at the n-th

ExponentialAverage is that of Block et al. 2023, "Butterfly Effects of SGD Noise", arXiv:2310.11428, whose decay grows
as 1 - t^(-2/3); default decay 0.999. PolynomialAverage is what DoG evaluates, γ = 8. TailAverage is stochastic weight
averaging: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
from three quarters of the budget on. Before its start the last iterate is evaluated.

BatchNorm statistics and other buffers are averaged like the weights. TailAverage recomputes those of BatchNorm before
each evaluation, from the examples of the last `swa_recalibration` steps (default 4). The paper does so once at the end,
from all training data. One state tensor per parameter and buffer, in float32 where these are narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, Wrapper, swapped
from submissions.rule import upcast


class Average(Wrapper):
    """The base of the averages: θ̄ ← (1 - c) θ̄ + c θ after each step. A subclass defines c as `weight`."""

    needs = frozenset({Need.EVALUATION_WEIGHTS})

    def __init__(self, setup: Setup, inner: Submission) -> None:
        super().__init__(setup, inner)
        self.count = 0
        self.average = [upcast(tensor).clone() for tensor in self._averaged_tensors()]

    def weight(self, t: int) -> float | None:
        """c after t = 1, 2, ... steps; None leaves the average unchanged."""
        raise NotImplementedError

    @override
    def step(self, ctx: StepContext) -> None:
        # The average includes the result of this step.
        super().step(ctx)
        self.count += 1
        weight = self.weight(self.count)
        if weight is not None:
            torch._foreach_lerp_(self.average, [upcast(tensor) for tensor in self._averaged_tensors()], weight)

    @override
    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with swapped(self._averaged_tensors(), self.average):
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average, "count": self.count}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average, self.count = state["average"], state["count"]

    def _averaged_tensors(self) -> list[Tensor]:
        """The trained parameters and the floating-point buffers of the model, parallel to `average`."""
        return [*(p.detach() for p in self.setup.parameters), *self.setup.buffers]


class ExponentialAverage(Average):
    """Exponential moving average of the weights. ema_decay: decay. ema_power: power of the warm-up of the decay."""

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.999,
        ema_power: Annotated[float, Interval(ge=0, le=1)] = 2 / 3,
    ) -> None:
        super().__init__(setup, inner)
        self.decay, self.power = ema_decay, ema_power

    @override
    def weight(self, t: int) -> float:
        return float(max(1 - self.decay, t**-self.power))


class PolynomialAverage(Average):
    """Polynomial averaging. average_gamma: γ; 0 is the plain mean of all iterates."""

    def __init__(self, setup: Setup, inner: Submission, *, average_gamma: NonNegativeFloat = 8.0) -> None:
        super().__init__(setup, inner)
        self.gamma = average_gamma

    @override
    def weight(self, t: int) -> float:
        return (1 + self.gamma) / (t + self.gamma)


class TailAverage(Average):
    """Stochastic weight averaging over the end of the budget.

    swa_start: first averaged step, as a share of the budget. swa_every: steps from one averaged iterate to the next.
    swa_recalibration: nominal steps whose examples give the BatchNorm statistics.
    """

    needs = frozenset({Need.EVALUATION_WEIGHTS, Need.TOTAL_STEPS})

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        swa_start: Annotated[float, Interval(ge=0, lt=1)] = 0.75,
        swa_every: PositiveInt = 1,
        swa_recalibration: NonNegativeInt = 4,
    ) -> None:
        super().__init__(setup, inner)
        self.recalibration = swa_recalibration
        self.start, self.every = int(swa_start * setup.total_steps), swa_every

    @override
    def weight(self, t: int) -> float | None:
        if t <= self.start:
            return 1.0
        number, steps_since_last = divmod(t - self.start, self.every)
        return None if steps_since_last else 1 / number

    @override
    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with super().evaluation_weights():
            # Until then the average is the last iterate, whose own statistics are right.
            if self.count > self.start + 1:
                self.setup.recalibrate(self.recalibration)
            yield
