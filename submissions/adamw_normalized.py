"""AdamW with normalised weight decay: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
arXiv:1711.05101, Algorithm 2 and appendix B.1. With b examples per batch, B training examples and T epochs,

    θ ← θ - s (α m̂ / (√v̂ + ε) + λ θ),   λ = λ_norm √(b / (B T))

where b / (B T) is one over the number of steps, so that λ_norm need not change with the budget. The learning rate is
η = s α with the schedule's factor s. torch's AdamW decays by η times its weight decay, so it is given λ / α. State: m
and v. Defaults: Adam's; λ_norm = 0.05 is equivalent to this project's recipe of AdamW.
"""

from __future__ import annotations

import torch

from harness.interface import Need, OptimizerSubmission, Setup


class AdamWNormalized(OptimizerSubmission):
    """AdamW with the weight decay of the module docstring. lr: α. weight_decay: λ_norm."""

    needs = frozenset({Need.TOTAL_STEPS})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
    ) -> None:
        decay = weight_decay / setup.total_steps**0.5 / lr
        groups = setup.decay_groups()
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True)
        super().__init__(setup, [adamw])
