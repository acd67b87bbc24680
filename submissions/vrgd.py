"""VRGD: Jiang, Liu, Ding, Guo & Lin 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
(GSNR)", arXiv:2309.13681, Algorithms 1 and 3. Gradients are scaled by how much the k micro-batches agree on them.
With their gradients g_d and the mean ḡ, elementwise:

    r = ḡ² / (1/k Σ_d g_d² - ḡ²),   r ← r / mean(r) within each tensor,   r ← clip(r, γ, 1)
    VR-SGD: SGD with momentum on r ⊙ ḡ
    VR-Adam: p ← β3 p + (1 - β3) r,   Adam on p / (1 - β3^t) ⊙ ḡ

The micro-batches are the workload's, or, where it has fewer than `pieces`, the batch is cut into that many; BatchNorm
then sees the smaller ones. Weight decay is decoupled for VR-Adam (torch's AdamW) and added to the gradient for VR-SGD.
State: the base optimizer's, and p for VR-Adam. Defaults: γ = 0.1, β3 = 0.9; in the paper k is the number of workers, so
that k = 8 is ours. The mean in r / mean(r) goes over a tensor, which the paper calls a layer.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import upcast

Pieces = Annotated[int, Ge(2)]
Least = Annotated[float, Interval(gt=0, le=1)]


class _VRGD(OptimizerSubmission):
    needs = frozenset({Need.MICRO_BATCH_GRADIENTS})

    def __init__(self, setup: Setup, base: torch.optim.Optimizer, pieces: int, gamma: float) -> None:
        super().__init__(setup, [base])
        self.pieces, self.gamma = pieces, gamma

    @override
    def step(self, ctx: StepContext) -> None:
        ratios = self.ratios(signal_to_noise(ctx.micro_batch_gradients(self.pieces), self.gamma))
        for parameter, ratio in zip(self.setup.parameters, ratios, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(ratio)
        self.clip_gradients()
        self.update(ctx)

    def ratios(self, new: list[Tensor]) -> list[Tensor]:
        """What multiplies the gradients."""
        return new


class VRSGD(_VRGD):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        pieces: Pieces = 8,
        gamma: Least = 0.1,
    ) -> None:
        groups = setup.decay_groups()
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)
        super().__init__(setup, sgd, pieces, gamma)


class VRAdam(_VRGD):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        pieces: Pieces = 8,
        gamma: Least = 0.1,
    ) -> None:
        groups = setup.decay_groups()
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(setup, adamw, pieces, gamma)
        self.beta3, self.steps = beta3, 0
        self.ratio = [torch.zeros_like(upcast(parameter)) for parameter in setup.parameters]

    @override
    def ratios(self, new: list[Tensor]) -> list[Tensor]:
        self.steps += 1
        torch._foreach_lerp_(self.ratio, new, 1 - self.beta3)
        return list(torch._foreach_div(self.ratio, 1 - self.beta3**self.steps))

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ratio": self.ratio, "steps": self.steps}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ratio, self.steps = state["ratio"], state["steps"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.ratio


def mean_and_squares(pieces: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Means over the micro-batches of their gradients and of the squares of those, at least in float32."""
    mean = [torch.zeros_like(upcast(gradient)) for gradient in pieces[0]]
    squares = [torch.zeros_like(upcast(gradient)) for gradient in pieces[0]]
    for piece in pieces:
        gradients = [upcast(gradient) for gradient in piece]
        torch._foreach_add_(mean, gradients, alpha=1 / len(pieces))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 / len(pieces))
    return mean, squares


def signal_to_noise(pieces: list[list[Tensor]], gamma: float) -> list[Tensor]:
    """The clipped ratio r (of no account where all gradients, and so the mean, are 0)."""
    mean, squares = mean_and_squares(pieces)
    tiny = torch.finfo(mean[0].dtype).tiny
    signal = torch._foreach_mul(mean, mean)
    noise = torch._foreach_sub(squares, signal)
    torch._foreach_clamp_min_(noise, tiny)
    ratio = torch._foreach_div(signal, noise)
    ratio = torch._foreach_div(ratio, [r.mean().clamp_min(tiny) for r in ratio])
    torch._foreach_clamp_min_(ratio, gamma)
    torch._foreach_clamp_max_(ratio, 1.0)
    return list(ratio)
