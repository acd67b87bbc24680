"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The momentum of each hidden matrix is replaced
by the nearest semi-orthogonal matrix (Newton-Schulz), and everything else is trained by AdamW.

The update of the matrices is `torch.optim.Muon`. By the post's rule it serves hidden matrices and convolutions, whose
filters [out, in, h, w] count as matrices [out, in·h·w]; embeddings, stem, head, norms and biases go to AdamW.
`adjust_lr_fn`: "original" scales by sqrt(max(1, rows / columns)), "match_rms_adamw" by 0.2 sqrt(max(rows, columns))
(Liu et al. 2025, arXiv:2502.16982).
"""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from harness.needs import Need
from harness.roles import Role
from harness.step import StepContext
from harness.submission import OptimizerSubmission, Setup

_MATRICES = {Role.HIDDEN_MATRIX, Role.CONVOLUTION}


class Muon(OptimizerSubmission):
    needs = frozenset({Need.PARAMETER_ROLES})

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
        matrices = [name for name in setup.named_parameters if setup.roles[name] in _MATRICES]
        rest = [name for name in setup.named_parameters if setup.roles[name] not in _MATRICES]
        # A parameter that shares its memory with the model's and has its shape as a matrix: updating it in place
        # updates the model.
        self._views = [
            (nn.Parameter(_as_matrix(parameter.detach(), like=parameter)), parameter)
            for parameter in (setup.named_parameters[name] for name in matrices)
        ]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                [view for view, _ in self._views],
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            optimizers.append(muon)
        if rest:
            adamw = torch.optim.AdamW(
                setup.decay_groups(rest),
                lr=adamw_lr,
                betas=adamw_betas,
                eps=adamw_eps,
                weight_decay=adamw_weight_decay,
                fused=True,
            )
            optimizers.append(adamw)
        super().__init__(setup, optimizers)

    def update(self, ctx: StepContext) -> None:
        for view, parameter in self._views:
            view.grad = None if parameter.grad is None else _as_matrix(parameter.grad, like=parameter)
        super().update(ctx)
        for view, _ in self._views:
            view.grad = None  # or the gradients would live on until the next step


def _as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """[out, ...] as [out, the rest], columns in the order of `like`'s memory; a view of a tensor laid out so."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
