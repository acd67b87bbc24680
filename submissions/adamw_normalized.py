"""AdamW with normalised weight decay: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
arXiv:1711.05101, Algorithm 2 and appendix B.1. With b examples per batch, B training examples and T epochs,

    θ ← θ - s (α m̂ / (√v̂ + ε) + λ θ),   λ = λ_norm √(b / (B T))

where b / (B T) is one over the number of steps, so that λ_norm can stay where the budget changes. The learning rate is
η = s α with the schedule's factor s, and torch's AdamW, which decays by η times its weight decay, gets λ / α.
`weight_decay` is λ_norm. State: m and v. Defaults: Adam's; λ_norm = 0.05 is what AdamW's recipe here amounts to.
"""

from __future__ import annotations

import torch

from harness.interface import Need, OptimizerSubmission, Setup


class AdamWNormalized(OptimizerSubmission):
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
