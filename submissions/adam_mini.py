"""Adam-mini: Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793, Algorithm 1. Adam
with one second moment for each block b of parameters that the Hessian couples:

    m ← β1 m + (1 - β1) g,   v_b ← β2 v_b + (1 - β2) mean(g_b²),   θ_b ← (1 - η λ) θ_b - η m̂_b / (√v̂_b + ε)

A block is an output neuron of a matrix (a row) or of a convolution (a filter), a token of an embedding or a head (a
row), and otherwise a whole tensor (Algorithm 3). The paper's blocks of query and key matrices are heads; here they are
rows like the others, which needs no knowledge of the model and is the finer of the two. State: m, and one number per
block. Defaults: the authors' code (η = 1e-3, β = (0.9, 0.95), ε = 1e-8, λ = 0.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.needs import Need
from harness.roles import Role
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import Group, ListRule, decay_weights, working_dtype

_BY_ROW = {Role.HIDDEN_MATRIX, Role.CONVOLUTION, Role.STEM, Role.EMBEDDING, Role.HEAD}


class AdamMini(OptimizerSubmission):
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
        by_row = [name for name in setup.named_parameters if setup.roles[name] in _BY_ROW]
        rest = [name for name in setup.named_parameters if name not in by_row]
        groups: list[dict[str, Any]] = [group | {"by_row": True} for group in setup.decay_groups(by_row)]
        groups += [group | {"by_row": False} for group in setup.decay_groups(rest)]
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, [AdamMiniRule(groups, adam)])


class AdamMiniRule(ListRule):
    """`by_row` of a parameter group: one block per row, or else one per tensor."""

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        lr, (beta1, beta2), step, by_row = group["lr"], group["betas"], group["step"], group["by_row"]

        def blocks(p: Tensor) -> Tensor:
            shape = [p.shape[0], *[1] * (p.ndim - 1)] if by_row and p.ndim else [1] * p.ndim
            return torch.zeros(shape, dtype=working_dtype(p), device=p.device)

        m, v = self.tensors(parameters, "exp_avg"), self.tensors(parameters, "block_sq", blocks)
        squares = torch._foreach_mul(gradients, gradients)
        means = [s.mean(list(range(int(by_row), s.ndim)), keepdim=True) if s.ndim > int(by_row) else s for s in squares]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_lerp_(v, means, 1 - beta2)
        denominator = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**step))
        torch._foreach_add_(denominator, group["eps"])
        decay_weights(parameters, lr, group["weight_decay"])
        direction = torch._foreach_div(m, denominator)
        torch._foreach_add_(parameters, direction, alpha=-lr / (1 - beta1**step))
