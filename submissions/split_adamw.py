"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a learning rate and a decay of their own for hidden matrices
and convolutions. With `submissions.weight_hooks.Hyperball` around it, it is AdamH: Wen et al. 2026, arXiv:2606.16899.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat

from harness.interface import MATRIX_ROLES, Need, OptimizerSubmission, Setup


class SplitAdamW(OptimizerSubmission):
    """AdamW with `lr` and `weight_decay` for hidden matrices and convolutions, `adamw_lr` and `adamw_weight_decay` for
    the rest."""

    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.018,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        adamw_lr: float = 3e-3,
        adamw_weight_decay: NonNegativeFloat = 0.1,
    ) -> None:
        matrices = [name for name in setup.named_parameters if setup.roles[name] in MATRIX_ROLES]
        rest = [name for name in setup.named_parameters if name not in matrices]
        parts = ((matrices, lr, weight_decay), (rest, adamw_lr, adamw_weight_decay))
        super().__init__(
            setup,
            [
                torch.optim.AdamW(
                    setup.decay_groups(names), lr=rate, betas=betas, eps=eps, weight_decay=decay, fused=True
                )
                for names, rate, decay in parts
                if names
            ],
        )
