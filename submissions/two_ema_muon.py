"""Muon with two moving averages in place of one: "bi-Maxwell momentum", modded-nanogpt track 3, pull request 340 (2026,
https://github.com/KellerJordan/modded-nanogpt/pull/340). From a part of the budget on, the momentum of
submissions/spectral.py is a mixture of a fast and a slow average of the gradient:

    M_fast ← β_fast M_fast + (1 - β_fast) G,   M_slow ← β_slow M_slow + (1 - β_slow) G
    M = (1 - w) M_fast + w M_slow

Until then both are the momentum with decay μ, so that the mixture starts where that has arrived. State: one matrix more
than Muon's. Defaults: the pull request's, w = 0.56, β = (0.85, 0.98), from step 1000 of 3250 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, Setup
from submissions.matrices import MatrixSubmission, stack_state
from submissions.rule import Bucket
from submissions.spectral import SpectralRule


class TwoEMAMuon(MatrixSubmission):
    """Muon with the momentum of the module docstring; AdamW for the rest.

    fast_slow: (β_fast, β_slow). slow_weight: w. mixture_start: the share of the budget after which the mixture holds.
    The others as of `submissions.spectral.Spectral`.
    """

    needs = MatrixSubmission.needs | {Need.TOTAL_STEPS}

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        polar: str = "quintic",
        scale: str = "original",
        polar_steps: PositiveInt = 5,
        fast_slow: tuple[float, float] = (0.85, 0.98),
        slow_weight: Annotated[float, Interval(ge=0, le=1)] = 0.56,
        mixture_start: Annotated[float, Interval(ge=0, le=1)] = 0.3,
        adamw_lr: PositiveFloat | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: NonNegativeFloat | None = None,
    ) -> None:
        self.check_hyperparameters({"fast_slow": fast_slow})
        rule: dict[str, Any] = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "polar": polar,
            "scale": scale, "polar_steps": polar_steps, "fast_slow": fast_slow, "slow_weight": slow_weight,
            "mixture_start": int(mixture_start * setup.total_steps),
        }  # fmt: skip
        adamw = {
            "lr": lr if adamw_lr is None else adamw_lr, "betas": adamw_betas, "eps": adamw_eps,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        }  # fmt: skip
        super().__init__(setup, lambda groups: TwoEMARule(groups, **rule), adamw)

    @classmethod
    @override
    def check_hyperparameters(cls, values: Mapping[str, Any]) -> None:
        if not all(0 <= beta < 1 for beta in values.get("fast_slow", ())):
            raise ValueError(f"fast_slow={values['fast_slow']}: both decays must be in [0, 1); correct them")


class TwoEMARule(SpectralRule):
    """The momentum of the module docstring. mixture_start: the last step without the mixture."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return super().initial_state(theta, g, group) | {"slow_momentum": torch.zeros_like(theta)}

    @override
    def average_momentum(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        fast, slow = stack_state(bucket, "momentum"), stack_state(bucket, "slow_momentum")
        if bucket.t <= bucket["mixture_start"]:
            fast.lerp_(gradient, 1 - bucket["momentum"])
            slow.copy_(fast)
            return fast
        for average, beta in zip((fast, slow), bucket["fast_slow"], strict=True):
            average.lerp_(gradient, 1 - beta)
        return fast.lerp(slow, bucket["slow_weight"])
