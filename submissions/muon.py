"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The momentum of each hidden matrix is replaced
by the nearest semi-orthogonal matrix (Newton-Schulz); AdamW trains everything else.

The matrices are updated by `torch.optim.Muon`. As the post advises, these are hidden matrices and convolutions, with
filters [out, in, h, w] as matrices [out, in·h·w]; AdamW trains embeddings, stem, head, norms and biases. State: the
momentum, and AdamW's two moments for its parameters. Defaults: the post's.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt

from harness.interface import Setup
from submissions.matrices import MatrixSubmission


class Muon(MatrixSubmission):
    """Muon for hidden matrices and convolutions, with AdamW for the rest.

    ns_steps: Newton-Schulz steps. adjust_lr_fn: "original" scales the learning rate by sqrt(max(1, rows / columns)),
    "match_rms_adamw" by 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: PositiveInt = 5,
        adjust_lr_fn: str = "original",
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        adamw_weight_decay: float = 0.0,
    ) -> None:
        # torch.optim.Muon accepts only two-dimensional parameters: the groups contain the matrix views.
        super().__init__(
            setup,
            lambda groups: torch.optim.Muon(
                groups,
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            ),
            {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay},
        )
