"""Lion-K: Chen, Liu, Liang & Liu 2023, "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
arXiv:2310.05898. Lion with the sign replaced by the gradient of a convex function K:

    c = β1 m + (1 - β1) g
    θ ← θ - η (∇K(c) + λ θ)
    m ← β2 m + (1 - β2) g

It minimises f(θ) + K*(λ θ) / λ, with K* the convex conjugate of K. K is chosen by `kernel`:

    l1      K = ‖c‖₁,            ∇K = sign(c): Lion, the constraint ‖θ‖∞ ≤ 1/λ
    l2      K = ‖c‖₂ per tensor, ∇K = c / ‖c‖₂: the constraint ‖θ‖₂ ≤ 1/λ on every tensor
    huber   ∇K = clip(c / width, -1, 1): a sign without the jump at zero

Defaults: Lion's; the paper gives none for the other kernels.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_

KERNELS = ("l1", "l2", "huber")


class LionK(Rule):
    """Lion-K: the update of the module docstring. kernel: K. width: the bound of the huber kernel's linear part."""

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        kernel: str = "l2",
        width: PositiveFloat = 1e-3,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel}: must be one of {', '.join(KERNELS)}; correct it")
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "kernel": kernel, "width": width}
        )

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum = bucket.state("momentum")
        # From the old momentum, so before its update.
        c = torch._foreach_lerp(momentum, bucket.g, 1 - beta1)
        average_(momentum, bucket.g, beta2)
        if bucket["kernel"] == "l1":
            torch._foreach_sign_(c)
        elif bucket["kernel"] == "l2":
            norms = torch._foreach_norm(c)
            # A tensor of zeros keeps the direction zero.
            torch._foreach_clamp_min_(norms, torch.finfo(norms[0].dtype).tiny)
            c = torch._foreach_div(c, norms)
        else:
            torch._foreach_div_(c, bucket["width"])
            torch._foreach_clamp_min_(c, -1.0)
            torch._foreach_clamp_max_(c, 1.0)
        return c
