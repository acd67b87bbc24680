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
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Role, Setup
from submissions.rule import Bucket, Rule, Tensors, adam_direction

MOMENTS = {"momentum": True, "second_moment": False}
"""Whether it has a sign."""


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
        block_size: PositiveInt = 2048,
        min_8bit_size: NonNegativeInt = 4096,
    ) -> None:
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


class AdamW8bitRule(Rule):
    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        blocks, state = -(-theta.numel() // group["block_size"]), {}
        for name, signed in MOMENTS.items():
            zero = int(code(signed).eq(0).nonzero())
            state[name] = torch.full((blocks, group["block_size"]), zero, dtype=torch.uint8, device=theta.device)
            state[f"{name}_scale"] = theta.new_zeros(blocks, 1)
        return state

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        size, counts = bucket["block_size"], [len(stored) for stored in bucket.state("momentum")]
        # All blocks of all tensors are one matrix [blocks, B].
        padded = [F.pad(g.reshape(-1), (0, n * size - g.numel())) for g, n in zip(bucket.g, counts, strict=True)]
        gradient = torch.cat(padded).view(-1, size)
        stored = {name: torch.cat(bucket.state(name)) for name in MOMENTS}
        scales = {name: torch.cat(bucket.state(f"{name}_scale")) for name in MOMENTS}
        moments = {name: _restored(stored[name], signed, gradient) * scales[name] for name, signed in MOMENTS.items()}
        m, v = [moments["momentum"]], [moments["second_moment"]]
        (direction,) = adam_direction(m, v, [gradient], bucket["betas"], bucket["eps"], bucket.t)
        for name, signed in MOMENTS.items():
            scale = moments[name].abs().amax(1, keepdim=True)
            indices = _nearest(moments[name] / scale.clamp_min(torch.finfo(scale.dtype).tiny), signed)
            torch._foreach_copy_(bucket.state(name), indices.split(counts))
            torch._foreach_copy_(bucket.state(f"{name}_scale"), scale.split(counts))
        return [
            piece.reshape(-1)[: theta.numel()].view(theta.shape)
            for theta, piece in zip(bucket.theta, direction.split(counts), strict=True)
        ]


def _restored(indices: Tensor, signed: bool, like: Tensor) -> Tensor:
    return code(signed).to(like).index_select(0, indices.view(-1).int()).view(indices.shape)


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """uint8, like x in [-1, 1]: the place in the code of the nearest value. Three times faster than a binary search."""
    places, borders = (table.to(x.device) for table in _search(signed))
    x = x.float()
    upper = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1)
    place = places.index_select(0, upper)
    return (place + (borders.index_select(0, place) < x.view(-1))).to(torch.uint8).view(x.shape)


@cache
def _search(signed: bool) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of every float32, the place of the smallest number that begins with them; and the borders
    between the places, of which no more than one lies among numbers of the same upper bits."""
    values = code(signed).float()
    borders = (values[1:] + values[:-1]) / 2
    first = (torch.arange(2**16) << 16).to(torch.int32)
    smallest = torch.minimum(first.view(torch.float32), (first | 0xFFFF).view(torch.float32)).nan_to_num(0.0)
    return torch.bucketize(smallest, borders, out_int32=True), torch.cat([borders, torch.tensor([torch.inf])])


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
