"""8-bit AdamW: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861, in plain torch. Both moments are stored as one byte per number between steps; an update restores them
to 32 bits, is AdamW's, and stores them again. Each block of B numbers is divided by its largest magnitude, and each
quotient replaced by the index of the nearest of 256 values: those of dynamic tree quantisation, dense near zero over
seven decades,

    the midpoints of 10^(i-6) · [0.1, 1], i = 0 ... 6, cut into 2^i equal parts (m, both signs) or 2^(i+1) parts (v);
    0 and 1

Tensors of fewer than 4096 numbers and embeddings keep 32-bit moments, as in the paper (whose stable embedding layer, a
change of the model, is left out). State: 2 bytes per number and 8 per block. Defaults: Adam's, B = 2048 (the paper).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.needs import Need
from harness.roles import Role
from harness.submission import OptimizerSubmission, Setup
from submissions.list_rule import Group, ListRule, decay_weights, update_moments


class AdamW8bit(OptimizerSubmission):
    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block_size: int = 2048,
        min_8bit_size: int = 4096,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        small = [
            name
            for name, parameter in setup.named_parameters.items()
            if parameter.numel() < min_8bit_size or setup.roles[name] is Role.EMBEDDING
        ]
        large = [name for name in setup.named_parameters if name not in small]
        adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        optimizers: list[torch.optim.Optimizer] = []
        if large:
            optimizers.append(AdamW8bitRule(setup.decay_groups(large), adam | {"block_size": block_size}))
        if small:
            optimizers.append(torch.optim.AdamW(setup.decay_groups(small), fused=True, **adam))
        super().__init__(setup, optimizers)


class AdamW8bitRule(ListRule):
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        size = group["block_size"]
        counts = [-(-p.numel() // size) for p in parameters]
        padded = [F.pad(g.reshape(-1), (0, n * size - g.numel())) for g, n in zip(gradients, counts, strict=True)]
        # All blocks of all tensors are one matrix [blocks, B].
        gradient = torch.cat(padded).view(-1, size)
        moments, stored = [], []
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zero = int(code(signed).eq(0).nonzero())
            bytes_ = self.tensors(parameters, key, lambda p, zero=zero: _bytes(p, size, zero))  # type: ignore[misc]
            scales = self.tensors(parameters, f"{key}_scale", lambda p: _scales(p, size))
            values = code(signed).to(gradient)
            moments.append(values[torch.cat(bytes_).int()] * torch.cat(scales))
            stored.append((bytes_, scales, values))
        m, v = moments
        (direction,) = update_moments([m], [v], [gradient], group["betas"], group["eps"], group["step"])
        for moment, (bytes_, scales, values) in zip(moments, stored, strict=True):
            scale = moment.abs().amax(1, keepdim=True)
            borders = (values[1:] + values[:-1]) / 2
            indices = torch.bucketize(moment / scale.clamp_min(torch.finfo(scale.dtype).tiny), borders)
            torch._foreach_copy_(bytes_, indices.to(torch.uint8).split(counts))
            torch._foreach_copy_(scales, scale.split(counts))
        decay_weights(parameters, group["lr"], group["weight_decay"])
        updates = [
            piece.reshape(-1)[: p.numel()].view(p.shape)
            for p, piece in zip(parameters, direction.split(counts), strict=True)
        ]
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


@cache
def code(signed: bool) -> Tensor:
    """The 256 values in increasing order, float64."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        for part in range(parts):
            middle = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade - 6)
            values += [middle, -middle] if signed else [middle]
    return torch.tensor(sorted(values), dtype=torch.float64)


def _bytes(parameter: Tensor, size: int, value: int) -> Tensor:
    blocks = -(-parameter.numel() // size)
    return torch.full((blocks, size), value, dtype=torch.uint8, device=parameter.device)


def _scales(parameter: Tensor, size: int) -> Tensor:
    return torch.zeros(-(-parameter.numel() // size), 1, device=parameter.device)
