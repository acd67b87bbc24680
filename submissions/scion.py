"""Scion: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls & Cevher 2025, "Training Deep Learning Models with
Norm-Constrained LMOs", ICML 2025, arXiv:2502.07529, Algorithms 1 and 2. One momentum for every parameter, and for each
role the steepest direction in a norm of its own; no second moment anywhere:

    M ← μ M + (1 - μ) G
    W ← W - η ρ lmo(M)                      unconstrained
    W ← (1 - η) W - η ρ lmo(M)              constrained to the ball of radius ρ

    hidden matrices, convolutions, stem     √(rows / columns) U Vᵀ for M = U S Vᵀ     (by Newton-Schulz)
    head                                    sign(M) / columns
    embeddings                              each row divided by its root mean square
    norms, biases                           divided by their root mean square

Filters [out, in, h, w] count as matrices [out, in·h·w]; the authors' code divides by h·w where this divides by √(h·w).
State: M. Defaults: the authors' code for language models (η = 2^-12, μ = 0.9, ρ = 50, and 3000 for the head).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import MATRIX_ROLES, Need, OptimizerSubmission, Role, Setup
from submissions.matrices import group_by_shape
from submissions.polar import map_spectrum
from submissions.rule import Bucket, Rule, Tensors, average_

SPECTRAL_ROLES = MATRIX_ROLES | {Role.STEM}


class Scion(OptimizerSubmission):
    """Scion as in the module docstring. momentum: μ. radius, head_radius: ρ. constrained: which of the two lines."""

    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 2**-12,
        momentum: float = 0.9,
        radius: PositiveFloat = 50.0,
        head_radius: PositiveFloat = 3000.0,
        constrained: bool = False,
        polar_steps: PositiveInt = 5,
    ) -> None:
        kinds: dict[str, list[str]] = {}
        for name in setup.named_parameters:
            kinds.setdefault(_kind(setup.roles[name], setup.named_parameters[name]), []).append(name)
        groups = [
            {
                "params": [setup.named_parameters[name] for name in names],
                "kind": kind,
                "radius": head_radius if kind == "sign" else radius,
            }
            for kind, names in kinds.items()
        ]
        shared = {"lr": lr, "momentum": momentum, "constrained": constrained, "polar_steps": polar_steps}
        super().__init__(setup, [ScionRule(groups, shared)])


class ScionRule(Rule):
    """The update of the module docstring, for groups with `kind` and `radius`."""

    buffers = ("momentum",)

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, {"kind": "spectral", "radius": 1.0} | hyperparameters)

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        average_(momentum, bucket.g, bucket["momentum"])
        minimise = {"spectral": _spectral, "sign": _sign, "rows": _unit_rows, "rms": _unit_rms}[bucket["kind"]]
        directions = minimise(momentum, bucket["polar_steps"])
        torch._foreach_mul_(directions, bucket["radius"])
        return directions

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        if bucket["constrained"]:
            torch._foreach_mul_(bucket.theta, 1 - bucket["lr"])
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])


def _kind(role: Role, parameter: Tensor) -> str:
    """Which of the four directions a parameter of this role takes."""
    if parameter.ndim < 2:
        return "rms"
    return "spectral" if role in SPECTRAL_ROLES else "sign" if role is Role.HEAD else "rows"


def _spectral(momentum: Tensors, polar_steps: int) -> Tensors:
    directions = [torch.zeros_like(m) for m in momentum]
    for indices in group_by_shape(momentum):
        matrices = torch.stack([momentum[index].flatten(1) for index in indices])
        scale = math.sqrt(matrices.shape[1] / matrices.shape[2])
        mapped = map_spectrum(matrices, steps=polar_steps) * scale
        for index, direction in zip(indices, mapped.unbind(), strict=True):
            directions[index].copy_(direction.view_as(directions[index]))
    return directions


def _sign(momentum: Tensors, polar_steps: int) -> Tensors:
    return [m.sign() / max(1, m[0].numel() if len(m) else 1) for m in momentum]


def _unit_rows(momentum: Tensors, polar_steps: int) -> Tensors:
    return [_unit(m.flatten(1), 1).view_as(m) if m.numel() else m.clone() for m in momentum]


def _unit_rms(momentum: Tensors, polar_steps: int) -> Tensors:
    return [_unit(m, None) if m.numel() else m.clone() for m in momentum]


def _unit(tensor: Tensor, dim: int | None) -> Tensor:
    """Divided by its root mean square, over a dimension or over all; zero where that is zero."""
    mean_square = tensor.square().mean() if dim is None else tensor.square().mean(dim, keepdim=True)
    return tensor / mean_square.sqrt().clamp_min(1e-12)
