"""Lion-K: Chen, Liu, Liang & Liu 2023, "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts",
arXiv:2310.05898. Lion with the sign replaced by the gradient of a convex function K:

    c = β1 m + (1 - β1) g
    θ ← θ - η (∇K(c) + λ θ)
    m ← β2 m + (1 - β2) g

It minimises f(θ) + K*(λ θ) / λ, with K* the convex conjugate of K. K is chosen by `kernel`:

    l1      K = ‖c‖₁,            ∇K = sign(c): Lion, the constraint ‖θ‖∞ ≤ 1/λ
    l2      K = ‖c‖₂ per tensor, ∇K = c / ‖c‖₂: the constraint ‖θ‖₂ ≤ 1/λ on every tensor
    lp      K = ‖c‖_p per tensor, ∇K = sign(c) |c|^(p-1) / ‖c‖_p^(p-1): the constraint ‖θ‖_q ≤ 1/λ, 1/p + 1/q = 1
    rows    K = Σ ‖row‖₂,        ∇K = each row over its norm: ‖row‖₂ ≤ 1/λ on every row (and on every vector)
    nuclear K = the sum of the singular values, ∇K = U Vᵀ: a largest singular value ≤ 1/λ, by Muon's five steps; filters
            count as matrices [out, the rest], and vectors take l2
    huber   ∇K = clip(c / width, -1, 1): a sign without the jump at zero

Defaults: Lion's; the paper gives none for the other kernels.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import PositiveFloat
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.matrices import group_by_shape
from submissions.polar import orthogonalise
from submissions.rule import Bucket, Rule, Tensors, average_

KERNELS = ("l1", "l2", "lp", "rows", "nuclear", "huber")
TINY = 1e-30


class LionK(Rule):
    """Lion-K: the update of the module docstring. kernel: K. width: the bound of the huber kernel's linear part. power:
    p of the kernel lp."""

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        kernel: str = "l2",
        width: PositiveFloat = 1e-3,
        power: Annotated[float, Interval(ge=1, le=10)] = 1.5,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel}: must be one of {', '.join(KERNELS)}; correct it")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "kernel": kernel, "width": width, "power": power},
        )

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta1, beta2 = bucket["betas"]
        momentum = bucket.state("momentum")
        # From the old momentum, so before its update.
        c: Tensors = torch._foreach_lerp(momentum, bucket.g, 1 - beta1)
        average_(momentum, bucket.g, beta2)
        if bucket["kernel"] == "l1":
            torch._foreach_sign_(c)
        elif bucket["kernel"] == "l2":
            norms = torch._foreach_norm(c)
            # A tensor of zeros keeps the direction zero.
            torch._foreach_clamp_min_(norms, torch.finfo(norms[0].dtype).tiny)
            c = torch._foreach_div(c, norms)
        elif bucket["kernel"] == "lp":
            c = [_lp_gradient(x, bucket["power"]) for x in c]
        elif bucket["kernel"] == "rows":
            c = [_unit(x, dim=-1) for x in c]
        elif bucket["kernel"] == "nuclear":
            c = _polar(c)
        else:
            torch._foreach_div_(c, bucket["width"])
            torch._foreach_clamp_min_(c, -1.0)
            torch._foreach_clamp_max_(c, 1.0)
        return c


def _lp_gradient(c: Tensor, power: float) -> Tensor:
    norm = torch.linalg.vector_norm(c, power).clamp_min(TINY)
    return c.sign() * (c.abs() / norm) ** (power - 1)


def _unit(c: Tensor, dim: int | None) -> Tensor:
    """c over its norm, or over those of its rows [..., columns]; filters have rows [out, the rest]."""
    flat = c.flatten(1) if c.ndim > 2 else c
    rows = dim if c.ndim > 1 else None
    return (flat / torch.linalg.vector_norm(flat, dim=rows, keepdim=rows is not None).clamp_min(TINY)).view(c.shape)


def _polar(tensors: Tensors) -> Tensors:
    """The polar factors of matrices, those of one shape together; vectors over their norms."""
    factors = [_unit(c, dim=None) if c.ndim < 2 else c for c in tensors]
    for indices in group_by_shape(tensors):
        if tensors[indices[0]].ndim >= 2:
            mapped = orthogonalise(torch.stack([tensors[index].flatten(1) for index in indices]))
            for index, factor in zip(indices, mapped.unbind(), strict=True):
                factors[index] = factor.view(tensors[index].shape)
    return factors
