"""Muon's family as parts. For each hidden matrix and convolution with gradient G [rows, columns]:

    C = G, or with γ > 0 its MARS correction G + γ μ/(1 - μ) (G - G_last), of norm at most 1
    M ← μ M + (1 - μ) C,   N = μ M + (1 - μ) C with Nesterov's momentum, else M
    U = after(map(before(N)))            map: submissions/polar.py, before and after: submissions/spectral_slots.py
    W ← W - η (s U + λ W)

with the scale s of a matrix's shape:

    original      √max(1, rows / columns)         Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    match_rms     0.2 √max(rows, columns)         Moonlight, Liu et al. 2025, arXiv:2502.16982: as large as AdamW's
    spectral      √(rows / columns)               Scion, Pethick et al. 2025, arXiv:2502.07529
    unit          1

With fraction f < 1 only the rows of M of largest sum |M| are mapped, ⌈f · rows⌉ of them, and M is kept without decay
but for those rows, which feed back what the step left out (Dion2 and NorDion2, Ahn et al. 2026, arXiv:2608.11612, named
Dion3 in their code):

    M ← M + G,   U[rows] = after(map(M[rows])),   M[rows] ← μ M[rows]

AdamW trains embeddings, stem, head, norms and biases. Muon's quintic steps, `none` in both slots and `original` is
Muon. State: M, what the slots hold (see there), G_last with γ > 0, and AdamW's two moments for its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, stack_state
from submissions.polar import POLAR_METHODS, map_spectrum
from submissions.rule import Bucket
from submissions.spectral_slots import AFTER, BEFORE, choices, normalise_rows_

SCALES = ("original", "match_rms", "spectral", "unit")


class Spectral(MatrixSubmission):
    """Muon's family for hidden matrices and convolutions, with AdamW for the rest.

    before, after: the slots. polar: the map of the spectrum; polar_steps and power are its. scale: s. momentum: μ.
    beta2, eps: of the slots' averages. fraction: f. gamma: γ of MARS. kronecker_power, precondition_frequency: of the
    slots kronecker and eigenbasis. norm_limit, step_floor: of the slot accumulated. adamw_lr and adamw_weight_decay:
    those of the matrices by default.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        before: str = "none",
        polar: str = "quintic",
        after: str = "none",
        scale: str = "original",
        polar_steps: PositiveInt = 5,
        power: Annotated[float, Interval(ge=-1, le=1)] = 0.0,
        beta2: float = 0.95,
        eps: float = 1e-8,
        fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        gamma: NonNegativeFloat = 0.0,
        kronecker_power: Annotated[float, Interval(ge=0, le=1)] = 0.3,
        precondition_frequency: PositiveInt = 10,
        norm_limit: PositiveFloat = 1.0,
        step_floor: NonNegativeFloat = 0.0,
        adamw_lr: PositiveFloat | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: NonNegativeFloat | None = None,
    ) -> None:
        rule: dict[str, Any] = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "before": before,
            "polar": polar, "after": after, "scale": scale, "polar_steps": polar_steps, "power": power, "beta2": beta2,
            "eps": eps, "fraction": fraction, "gamma": gamma, "kronecker_power": kronecker_power,
            "precondition_frequency": precondition_frequency, "norm_limit": norm_limit, "step_floor": step_floor,
        }  # fmt: skip
        adamw = {
            "lr": lr if adamw_lr is None else adamw_lr, "betas": adamw_betas, "eps": adamw_eps,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        }  # fmt: skip
        super().__init__(setup, lambda groups: SpectralRule(groups, **rule), adamw)

    @classmethod
    @override
    def check_hyperparameters(cls, values: Mapping[str, Any]) -> None:
        known = {name: value for name, value in values.items() if name in SpectralRule.defaults_by_name}
        SpectralRule([nn.Parameter(torch.zeros(2, 2))], **known)

    @classmethod
    @override
    def describe_host_waits(cls, values: Mapping[str, Any]) -> str:
        slot = BEFORE.get(values.get("before", "none"))
        waits = [slot.waits] if slot is not None else []
        if values.get("polar") in ("exact", "power"):
            waits.append("every step, for a singular value decomposition of each shape")
        return "; ".join(filter(None, waits))


class SpectralRule(MatrixRule):
    """The update of the module docstring, for the hyperparameters of `Spectral`."""

    defaults_by_name: ClassVar[dict[str, Any]] = {
        "lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "before": "none", "polar": "quintic",
        "after": "none", "scale": "original", "polar_steps": 5, "power": 0.0, "beta2": 0.95, "eps": 1e-8,
        "fraction": 1.0, "gamma": 0.0, "kronecker_power": 0.3, "precondition_frequency": 10, "norm_limit": 1.0,
        "step_floor": 0.0,
    }  # fmt: skip

    def __init__(self, params: ParamsT, **hyperparameters: Any) -> None:
        values = self.defaults_by_name | hyperparameters
        choices("before", values["before"], BEFORE)
        choices("polar", values["polar"], POLAR_METHODS)
        choices("after", values["after"], AFTER)
        choices("scale", values["scale"], SCALES)
        if values["fraction"] < 1:
            refused = {name: values[name] for name, plain in (("before", "none"), ("gamma", 0.0))
                       if values[name] != plain}  # fmt: skip
            if values["after"] not in ("none", "row"):
                refused["after"] = values["after"]
            if refused:
                listed = ", ".join(f"{name}={value}" for name, value in refused.items())
                raise ValueError(
                    f"fraction={values['fraction']} maps some rows of an accumulator, with which {listed} has no "
                    "meaning; use fraction=1, or before=none gamma=0 and after=none or row"
                )
        if values["power"] and values["polar"] != "power":
            raise ValueError(f"power={values['power']} belongs to polar=power, and polar is {values['polar']}; set it")
        super().__init__(params, values)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"momentum": torch.zeros_like(theta)}
        # Starting at g itself leaves the first step without a correction.
        if group["gamma"]:
            state["last_gradient"] = g.clone()
        return state | BEFORE[group["before"]].initial_state(theta) | AFTER[group["after"]].initial_state(theta)

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        scale = shape_scale(bucket["scale"], *gradient.shape[1:])
        if bucket["fraction"] < 1:
            return self._map_rows(bucket, gradient).mul_(scale)
        corrected = self._reduce_variance(bucket, gradient) if bucket["gamma"] else gradient
        momentum = self.average_momentum(bucket, corrected)
        moved = corrected.lerp(momentum, bucket["momentum"]) if bucket["nesterov"] else momentum
        balanced = BEFORE[bucket["before"]].apply(bucket, moved, momentum, corrected)
        mapped = map_spectrum(balanced, bucket["polar"], bucket["polar_steps"], bucket["power"])
        return AFTER[bucket["after"]].apply(bucket, mapped, momentum, corrected) * scale

    def average_momentum(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        """M after it was averaged with the gradient [n, rows, columns]; not to be written to."""
        return stack_state(bucket, "momentum").lerp_(gradient, 1 - bucket["momentum"])

    def _reduce_variance(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        """MARS' correction of the gradient, which is kept for the next step."""
        last, mu = stack_state(bucket, "last_gradient"), bucket["momentum"]
        corrected = gradient + (gradient - last) * (bucket["gamma"] * mu / (1 - mu))
        last.copy_(gradient)
        return corrected / torch.linalg.matrix_norm(corrected, keepdim=True).clamp_min(1.0)

    def _map_rows(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        """The direction with a fraction of the rows, and zeros in the others."""
        momentum = stack_state(bucket, "momentum").add_(gradient)
        count = math.ceil(bucket["fraction"] * momentum.shape[1])
        rows = momentum.abs().sum(2).topk(count, dim=1).indices.unsqueeze(2)
        chosen = momentum.take_along_dim(rows, 1)
        momentum.scatter_(1, rows.expand_as(chosen), chosen * bucket["momentum"])
        mapped = map_spectrum(chosen, bucket["polar"], bucket["polar_steps"], bucket["power"])
        if bucket["after"] == "row":
            v = stack_state(bucket, "row_moment")
            v_chosen = v.take_along_dim(rows, 1)
            mapped = normalise_rows_(v_chosen, mapped, bucket["beta2"], bucket["eps"])
            v.scatter_(1, rows, v_chosen)
        return torch.zeros_like(momentum).scatter_(1, rows.expand_as(mapped), mapped)


def shape_scale(name: str, rows: int, columns: int) -> float:
    """s of the module docstring for a matrix of this shape."""
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    if name == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if name == "spectral" else 1.0
