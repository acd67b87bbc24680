"""Complex momentum: Lorraine et al. 2021, "Complex Momentum for Optimization in Games", arXiv:2102.08431. Heavy ball
with a complex momentum coefficient β = |β| e^{iφ}, which also rotates the buffer:

    μ ← β μ - g
    θ ← θ + η Re(μ) - η λ θ

φ = 0 is classical momentum. Two state tensors per parameter, the real and the imaginary part. Defaults: |β| = 0.9 and
the paper's φ = π/8 for games. The paper has no weight decay; here it is decoupled.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Interval
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors


class ComplexMomentum(Rule):
    """SGD with complex momentum: the update of the module docstring. momentum: |β|. angle: φ in radians."""

    elementwise = True
    buffers = ("real", "imaginary")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        momentum: float = 0.9,
        angle: Annotated[float, Interval(ge=0, le=math.pi)] = math.pi / 8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "angle": angle, "weight_decay": weight_decay})

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        beta_real = bucket["momentum"] * math.cos(bucket["angle"])
        beta_imaginary = bucket["momentum"] * math.sin(bucket["angle"])
        real, imaginary = bucket.state("real"), bucket.state("imaginary")
        # The new imaginary part waits in a tensor of its own, since the real part still needs the old one.
        new_imaginary = torch._foreach_mul(imaginary, beta_real)
        torch._foreach_add_(new_imaginary, real, alpha=beta_imaginary)
        torch._foreach_mul_(real, beta_real)
        torch._foreach_sub_(real, imaginary, alpha=beta_imaginary)
        torch._foreach_sub_(real, bucket.g)
        torch._foreach_copy_(imaginary, new_imaginary)
        return torch._foreach_neg(real)
