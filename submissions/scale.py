"""SCALE: Glentis, Li, Han & Hong 2025, "A Minimalist Optimizer Design for LLM Pretraining", arXiv:2506.16659. Gradient
descent with columns of norm 1, and momentum for the last layer alone:

    M = G, but for the head M ← β M + (1 - β) G
    W ← W - η (C(M) + λ W),    C(M)[:, j] = M[:, j] / ‖M[:, j]‖

for every weight of two or more dimensions, embeddings too; filters [out, in, h, w] count as matrices [out, in·h·w].
Adam trains the vectors, as in the paper. State: the head's momentum, and Adam's two moments of the vectors. Defaults:
β = 0.9, η = 1e-3, Adam's η the same.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Role, Setup
from submissions.rule import Bucket, Rule, Tensors, average_

TINY = 1e-30


class Scale(OptimizerSubmission):
    """SCALE as in the module docstring, with AdamW for vectors. momentum: β. adamw_lr: η of the vectors, by default the
    same."""

    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adamw_lr: PositiveFloat | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        matrices = [name for name, parameter in setup.named_parameters.items() if parameter.ndim >= 2]
        vectors = [name for name in setup.named_parameters if name not in matrices]
        heads = [name for name in matrices if setup.roles[name] is Role.HEAD]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            hidden = [name for name in matrices if name not in heads]
            groups = [group | {"momentum": 0.0} for group in setup.decay_groups(hidden)]
            groups += setup.decay_groups(heads)
            optimizers.append(ScaleRule(groups, lr=lr, momentum=momentum, weight_decay=weight_decay))
        if vectors:
            optimizers.append(
                torch.optim.AdamW(
                    setup.decay_groups(vectors), lr=lr if adamw_lr is None else adamw_lr, betas=adamw_betas,
                    weight_decay=adamw_weight_decay, fused=True,
                )
            )  # fmt: skip
        super().__init__(setup, optimizers)


class ScaleRule(Rule):
    """SCALE's update. A group with momentum 0 keeps no state."""

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(theta)} if group["momentum"] else {}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        moved: Tensors = bucket.g
        if bucket["momentum"]:
            moved = bucket.state("momentum")
            average_(moved, bucket.g, bucket["momentum"])
        return [_unit_columns(m) for m in moved]


def _unit_columns(tensor: Tensor) -> Tensor:
    """A tensor [out, ...] with columns, over the first dimension, of norm 1; zero columns stay zero."""
    return tensor / torch.linalg.vector_norm(tensor, dim=0, keepdim=True).clamp_min(TINY)
