"""Adam-mini: Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793, Algorithm 1. Adam
with one second moment for each block b of parameters that the Hessian couples:

    m ← β1 m + (1 - β1) g,   v_b ← β2 v_b + (1 - β2) mean(g_b²),   θ_b ← (1 - η λ) θ_b - η m̂_b / (√v̂_b + ε)

A block is an output neuron of a matrix (a row) or of a convolution (a filter), a token of an embedding or a head (a
row), and otherwise the whole tensor (Algorithm 3). Query and key matrices have one block per head in the paper and one
per row here, which is finer and needs no knowledge of the model. State: m, and one number per block. Defaults: the
authors' code (η = 1e-3, β = (0.9, 0.95), ε = 1e-8, λ = 0.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Role, Setup
from submissions.rule import Bucket, Rule, Tensors, average_, root

_ROLES_BY_ROW = {Role.HIDDEN_MATRIX, Role.CONVOLUTION, Role.STEM, Role.EMBEDDING, Role.HEAD}
"""Roles of parameters with one block per row; all others are one block."""


class AdamMini(OptimizerSubmission):
    """Adam-mini as in the module docstring, with blocks by the roles of the parameters."""

    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        by_row = [name for name in setup.named_parameters if setup.roles[name] in _ROLES_BY_ROW]
        rest = [name for name in setup.named_parameters if name not in by_row]
        groups: list[dict[str, Any]] = [group | {"by_row": True} for group in setup.decay_groups(by_row)]
        groups += [group | {"by_row": False} for group in setup.decay_groups(rest)]
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, [AdamMiniRule(groups, adam)])


class AdamMiniRule(Rule):
    """The update of the module docstring. `by_row` of a parameter group: one block per row if true, else per tensor."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        # The means are computed for their shape.
        return {"momentum": torch.zeros_like(theta), "block_moment": torch.zeros_like(_block_means(g, group["by_row"]))}

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        (beta1, beta2), momentum, blocks = bucket["betas"], bucket.state("momentum"), bucket.state("block_moment")
        average_(momentum, bucket.g, beta1)
        average_(blocks, [_block_means(g, bucket["by_row"]) for g in torch._foreach_mul(bucket.g, bucket.g)], beta2)
        denominator = root(blocks, 1 - beta2**bucket.t, bucket["eps"], scale=1 - beta1**bucket.t)
        return torch._foreach_div(momentum, denominator)


def _block_means(values: Tensor, by_row: bool) -> Tensor:
    """The mean of each block, in a shape that broadcasts to that of `values`."""
    averaged = list(range(int(by_row), values.ndim))
    return values.mean(averaged, keepdim=True) if averaged and values.numel() else values
