"""Learning-rate schedules: the factor on the learning rate as a function of nominal steps.

Every schedule warms up linearly over ``warmup_fraction`` of its horizon and ends at the horizon, which is
``horizon_fraction`` of the budget; after it the factor stays at ``final_fraction``. The horizon is a hyperparameter
like any other: decaying over the whole budget moves every crossing of the target to its end, and hides who is fast.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

_OPTIONS_OF_SHAPE = {
    "step": ("step_count", "step_factor"), "restarts": ("cycles", "cycle_factor"), "table": ("table",),
    "wsd": ("tail", "rest_decay_fraction"),
}  # fmt: skip
"""Options that only one shape has. Records of other shapes do not mention them."""
_NEW_OPTIONS = {"tail": "linear", "rest_decay_fraction": None, "power": 1.0, "scale_weight_decay": False}
"""Options that came later, with their defaults, which records do not mention either."""
Part = Literal["matrices", "rest"]
"""Hidden matrices and convolutions, and all other parameters, whose rates a wsd may let fall apart."""


class Schedule(BaseModel):
    """Shape and length of the learning-rate schedule; `factor` multiplies the learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["constant", "linear", "power", "cosine", "wsd", "step", "restarts", "table"]
    """constant; linear: linear decay; power: (1 - t)^p, t the share of the way from the warm-up to the horizon; cosine:
    half a cosine (Loshchilov & Hutter 2017, eq. 5); wsd: warmup-stable-decay (Hu et al. 2024); step: stages of equal
    length, each at `step_factor` times the one before; restarts: half cosines with warm restarts (SGDR, Loshchilov &
    Hutter 2017); table: any other, by a table of factors."""
    warmup_fraction: float = Field(ge=0, lt=1)
    """Share of the horizon over which the factor rises linearly to 1."""
    horizon_fraction: float = Field(gt=0, le=1)
    """The horizon, as a share of the budget."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Factor at the horizon and after it (shapes that decay)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd only: share of the horizon over which the factor falls linearly at the end."""
    step_count: int = Field(default=4, ge=1)
    """step only: number of stages."""
    step_factor: float = Field(default=0.25, gt=0, lt=1)
    """step only: the factor from one stage to the next."""
    cycles: int = Field(default=3, ge=1)
    """restarts only: number of cosines."""
    cycle_factor: float = Field(default=2.0, ge=1)
    """restarts only: each cycle is so many times longer than the one before (T_mult of SGDR)."""

    tail: Literal["linear", "sqrt", "power"] = "linear"
    """wsd only: its decay is 1 - t; 1 - √t (Hägele et al. 2024, arXiv:2405.18392); or (1 - t)^p."""
    power: float = Field(default=1.0, gt=0)
    """power, and wsd with tail=power: p."""
    rest_decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """wsd only: `decay_fraction` of all parameters but hidden matrices and convolutions. None: the same."""
    scale_weight_decay: bool = False
    """Whether the weight decay of each parameter group is multiplied by the factor as well as its learning rate. A
    decoupled decay, which the learning rate multiplies, then falls with the square of the factor."""

    table: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """table only: factors at equal distances from the warm-up's end to the horizon, linear between them."""

    @model_validator(mode="after")
    def _check_shape(self) -> Schedule:
        if (len(self.table) < 2) == (self.shape == "table") or (self.table and self.shape != "table"):
            raise ValueError(
                f"shape={self.shape} with a table of {len(self.table)} factors; shape=table has two or more, the other "
                "shapes have none"
            )
        for name, share in (("decay_fraction", self.decay_fraction), ("rest_decay_fraction", self.rest_decay_fraction)):
            if self.shape == "wsd" and share is not None and self.warmup_fraction + share > 1:
                raise ValueError(
                    f"warmup_fraction={self.warmup_fraction} and {name}={share} "
                    "add up to more than 1, the whole horizon; lower one"
                )
        powered = self.shape == "power" or (self.shape == "wsd" and self.tail == "power")
        unused = {
            "tail": self.tail != "linear" and self.shape != "wsd",
            "rest_decay_fraction": self.rest_decay_fraction is not None and self.shape != "wsd",
            "power": self.power != 1 and not powered,
        }
        for name in (name for name, is_unused in unused.items() if is_unused):
            needed = "shape=power or shape=wsd tail=power" if name == "power" else "shape=wsd"
            raise ValueError(
                f"{name}={getattr(self, name)} has no effect with shape={self.shape}; it belongs to {needed}"
            )
        return self

    # Options that do not apply are left out, so that an option added to one shape leaves the identity of records with
    # another shape as it is.
    @model_serializer(mode="wrap")
    def _serialize_used_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = [name for shape, names in _OPTIONS_OF_SHAPE.items() if shape != self.shape for name in names]
        unused += [name for name, default in _NEW_OPTIONS.items() if getattr(self, name) == default]
        return {name: value for name, value in handler(self).items() if name not in unused}

    def factor(self, step: float, total_steps: int, part: Part = "matrices") -> float:
        """Factor for the update made after `step` nominal steps, 0 <= step < total_steps (the budget).

        part: of the parameters whose factor it is.
        """
        horizon = self.horizon_fraction * total_steps
        warmup = self.warmup_fraction * horizon
        if step < warmup:
            # step + 1: a factor of 0 would waste the first update. min: warmup need not be a whole number of steps.
            return min(1.0, (step + 1) / warmup)
        if self.shape == "constant":
            return 1.0
        if step >= horizon:
            return self.final_fraction
        decay = self.rest_decay_fraction if part == "rest" and self.rest_decay_fraction else self.decay_fraction
        start = horizon * (1 - decay) if self.shape == "wsd" else warmup
        # max: wsd is still before its decay.
        progress = max(0.0, (step - start) / (horizon - start))
        if self.shape == "step":
            return self.step_factor ** int(progress * self.step_count)
        if self.shape == "table":
            position = progress * (len(self.table) - 1)
            # min: a progress that rounds to 1 belongs to the last interval.
            left = min(int(position), len(self.table) - 2)
            return self.table[left] + (position - left) * (self.table[left + 1] - self.table[left])
        if self.shape == "restarts":
            progress = self._progress_in_cycle(progress)
        falling = 1 - progress
        if self.shape in ("cosine", "restarts"):
            falling = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.shape == "power" or (self.shape == "wsd" and self.tail == "power"):
            falling **= self.power
        elif self.shape == "wsd" and self.tail == "sqrt":
            falling = 1 - math.sqrt(progress)
        return self.final_fraction + (1 - self.final_fraction) * falling

    def _progress_in_cycle(self, progress: float) -> float:
        """Progress in [0, 1] within the current cycle; the cycles have lengths 1, r, r², ... in r = cycle_factor."""
        lengths = [self.cycle_factor**k for k in range(self.cycles)]
        position = progress * sum(lengths)
        for length in lengths:
            if position < length:
                return position / length
            # Rounding may leave `position` behind the last cycle, hence the 1.0 below.
            position -= length
        return 1.0
