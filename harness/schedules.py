"""Learning-rate schedules: the factor on the learning rate as a function of nominal steps.

Every schedule warms up linearly over ``warmup_fraction`` of its horizon and is over at the horizon, which is
``horizon_fraction`` of the budget; after it the factor stays at ``final_fraction``. The horizon is a hyperparameter
like any other: decaying over the whole budget puts every crossing of the target late and hides who is fast.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Schedule(BaseModel):
    """Shape and length of the learning-rate schedule. `factor(step)` is what multiplies the learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["constant", "linear", "cosine", "wsd"]
    """constant; linear decay; half a cosine (Loshchilov & Hutter 2017, eq. 5); warmup-stable-decay (Hu et al. 2024)."""
    warmup_fraction: float = Field(ge=0, lt=1)
    """Share of the horizon over which the factor rises linearly to 1."""
    horizon_fraction: float = Field(gt=0, le=1)
    """The horizon, as a share of the budget."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Factor at the horizon and after it (shapes that decay)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd only: share of the horizon over which the factor falls linearly at the end."""

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.shape == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "add up to more than 1, the whole horizon; lower one"
            )
        return self

    def factor(self, step: float, total_steps: int) -> float:
        """Factor for the update made after `step` nominal steps, 0 <= step < total_steps (the budget)."""
        horizon = self.horizon_fraction * total_steps
        warmup = self.warmup_fraction * horizon
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        if self.shape == "constant":
            return 1.0
        if step >= horizon:
            return self.final_fraction
        start = horizon * (1 - self.decay_fraction) if self.shape == "wsd" else warmup
        progress = max(0.0, (step - start) / (horizon - start))
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.final_fraction + (1 - self.final_fraction) * falling
