"""VRGD: Jiang, Liu, Ding, Guo & Lin 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
(GSNR)", arXiv:2309.13681, Algorithms 1 and 3. Gradients are scaled elementwise by their signal-to-noise ratio over k
micro-batches. With the gradients g_d of the micro-batches and their mean ḡ:

    r = ḡ² / (1/k Σ_d g_d² - ḡ²),   r ← r / mean(r) within each tensor,   r ← clip(r, γ, 1)
    VR-SGD: SGD with momentum on r ⊙ ḡ
    VR-LARS: LARS on r ⊙ ḡ                                                         (submissions/lars.py)
    VR-Adam, VR-LAMB: p ← β3 p + (1 - β3) r,   Adam or LAMB on p / (1 - β3^t) ⊙ ḡ  (submissions/lamb.py)

The micro-batches are the workload's. Where it has fewer than `pieces`, the batch is cut into that many, and BatchNorm
statistics are those of the smaller micro-batches. Weight decay is decoupled for VR-Adam (torch's AdamW) and part of the
gradient for VR-SGD. State: the base optimizer's, and p for VR-Adam and VR-LAMB. Defaults: γ = 0.1, β3 = 0.9. The
paper's k is the number of workers; the default k = 8 is ours. mean(r) is over a tensor, which the paper calls a layer.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.lamb import Lamb
from submissions.lars import LARS
from submissions.rule import upcast

MicroBatchCount = Annotated[int, Ge(2)]
"""Type of the hyperparameter `pieces`: a variance needs two micro-batches."""
LowerBound = Annotated[float, Interval(gt=0, le=1)]
"""Type of the hyperparameter `gamma`."""


class _VRGDSubmission(OptimizerSubmission):
    """An optimizer on gradients that are multiplied by r, or by what a subclass's `smooth_ratios` makes of it."""

    needs = frozenset({Need.MICRO_BATCH_GRADIENTS})

    def __init__(self, setup: Setup, base: torch.optim.Optimizer, pieces: int, gamma: float) -> None:
        super().__init__(setup, [base])
        self.pieces, self.gamma = pieces, gamma

    @override
    def step(self, ctx: StepContext) -> None:
        # The call also puts the gradient of the whole batch, ḡ, into `.grad`.
        ratios = self.smooth_ratios(signal_to_noise(ctx.micro_batch_gradients(self.pieces), self.gamma))
        for parameter, ratio in zip(self.setup.parameters, ratios, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(ratio)
        # After the scaling, so that the norm of the scaled gradient is clipped.
        self.clip_gradients()
        self.update(ctx)

    def smooth_ratios(self, ratios: list[Tensor]) -> list[Tensor]:
        """The factors on the gradients, from the ratios r of this step; lists parallel to the parameters."""
        return ratios


class VRSGD(_VRGDSubmission):
    """VR-SGD: SGD with momentum on r ⊙ ḡ. pieces: least number k of micro-batches. gamma: γ, the lower bound of r."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        pieces: MicroBatchCount = 8,
        gamma: LowerBound = 0.1,
    ) -> None:
        groups = setup.decay_groups()
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)
        super().__init__(setup, sgd, pieces, gamma)


class VRLARS(_VRGDSubmission):
    """VR-LARS: LARS on r ⊙ ḡ. trust: τ of LARS; the others as of `VRSGD`."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        trust: PositiveFloat = 1e-3,
        weight_decay: float = 5e-4,
        pieces: MicroBatchCount = 8,
        gamma: LowerBound = 0.1,
    ) -> None:
        lars = LARS(setup.decay_groups(), lr=lr, momentum=momentum, trust=trust, weight_decay=weight_decay)
        super().__init__(setup, lars, pieces, gamma)


class _SmoothedSubmission(_VRGDSubmission):
    """An optimizer on the moving average of r times ḡ."""

    def __init__(self, setup: Setup, base: torch.optim.Optimizer, pieces: int, gamma: float, beta3: float) -> None:
        super().__init__(setup, base, pieces, gamma)
        # p is kept here and not in the base optimizer, which would give it the parameter's dtype.
        self.beta3, self.steps = beta3, 0
        self.ratio = [torch.zeros_like(upcast(parameter)) for parameter in setup.parameters]

    @override
    def smooth_ratios(self, ratios: list[Tensor]) -> list[Tensor]:
        self.steps += 1
        torch._foreach_lerp_(self.ratio, ratios, 1 - self.beta3)
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


class VRAdam(_SmoothedSubmission):
    """VR-Adam: AdamW on the moving average of r times ḡ; hyperparameters as of `VRSGD`."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        pieces: MicroBatchCount = 8,
        gamma: LowerBound = 0.1,
    ) -> None:
        groups = setup.decay_groups()
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(setup, adamw, pieces, gamma, beta3)


class VRLamb(_SmoothedSubmission):
    """VR-LAMB: LAMB on the moving average of r times ḡ; hyperparameters as of `VRSGD`."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        pieces: MicroBatchCount = 8,
        gamma: LowerBound = 0.1,
    ) -> None:
        lamb = Lamb(setup.decay_groups(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(setup, lamb, pieces, gamma, beta3)


def mean_and_mean_square(micro_batch_gradients: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """The means over the micro-batches of g_d and of g_d², at least in float32.

    micro_batch_gradients: a list parallel to the parameters for each micro-batch. Returns two such lists.
    """
    count = len(micro_batch_gradients)
    mean = [torch.zeros_like(upcast(gradient)) for gradient in micro_batch_gradients[0]]
    mean_square = [torch.zeros_like(upcast(gradient)) for gradient in micro_batch_gradients[0]]
    for micro_gradients in micro_batch_gradients:
        gradients = [upcast(gradient) for gradient in micro_gradients]
        torch._foreach_add_(mean, gradients, alpha=1 / count)
        torch._foreach_addcmul_(mean_square, gradients, gradients, 1 / count)
    return mean, mean_square


def signal_to_noise(micro_batch_gradients: list[list[Tensor]], gamma: float) -> list[Tensor]:
    """The clipped ratio r of the module docstring, a list parallel to the parameters.

    Where all gradients of an element are 0 its ratio has no meaning, but it multiplies a mean of 0.
    """
    mean, mean_square = mean_and_mean_square(micro_batch_gradients)
    tiny = torch.finfo(mean[0].dtype).tiny
    signal = torch._foreach_mul(mean, mean)
    # Rounding may make the difference of two nearly equal numbers negative.
    noise = torch._foreach_sub(mean_square, signal)
    torch._foreach_clamp_min_(noise, tiny)
    ratio = torch._foreach_div(signal, noise)
    ratio = torch._foreach_div(ratio, [r.mean().clamp_min(tiny) for r in ratio])
    torch._foreach_clamp_min_(ratio, gamma)
    torch._foreach_clamp_max_(ratio, 1.0)
    return list(ratio)
