"""8-bit AdamW: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861, in plain torch. Between steps both moments are stored as one byte per number; a step dequantises them
to 32 bits, makes AdamW's update and quantises them again. Each block of B numbers is divided by its largest magnitude,
and each quotient is replaced by the index of the nearest of 256 levels. The levels are those of dynamic tree
quantisation, dense near zero over seven decades:

    the midpoints of 10^(i-6) · [0.1, 1], i = 0 ... 6, cut into 2^i equal parts (m, both signs) or 2^(i+1) parts (v);
    0 and 1

Tensors of fewer than 4096 numbers and embeddings keep 32-bit moments, as in the paper. (The paper's stable embedding
layer changes the model and is left out.) State: 2 bytes per number and 8 per block. Defaults: Adam's, B = 2048 (the
paper).
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

IS_SIGNED = {"momentum": True, "second_moment": False}
"""The two moments, and whether their numbers have a sign."""


class AdamW8bit(OptimizerSubmission):
    """8-bit AdamW as in the module docstring, with AdamW for small tensors and embeddings.

    block_size: B. min_8bit_size: tensors of fewer elements keep 32-bit moments.
    """

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
    """AdamW with quantised moments for all parameters of its groups.

    State per moment: uint8 [blocks, B], padded with the index of zero, and the blocks' scales [blocks, 1].
    """

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        blocks, state = -(-theta.numel() // group["block_size"]), {}
        for name, signed in IS_SIGNED.items():
            index_of_zero = int(quantisation_levels(signed).eq(0).nonzero())
            shape = (blocks, group["block_size"])
            state[name] = torch.full(shape, index_of_zero, dtype=torch.uint8, device=theta.device)
            state[f"{name}_scale"] = theta.new_zeros(blocks, 1)
        return state

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        size, counts = bucket["block_size"], [len(blocks) for blocks in bucket.state("momentum")]
        # All blocks of all tensors in one matrix [blocks, B], so that a step is a few operations.
        # Zeros as padding do not change the scale of a block.
        padded = [F.pad(g.reshape(-1), (0, n * size - g.numel())) for g, n in zip(bucket.g, counts, strict=True)]
        gradient = torch.cat(padded).view(-1, size)
        stored = {name: torch.cat(bucket.state(name)) for name in IS_SIGNED}
        scales = {name: torch.cat(bucket.state(f"{name}_scale")) for name in IS_SIGNED}
        moments = {
            name: _dequantise(stored[name], signed, gradient) * scales[name] for name, signed in IS_SIGNED.items()
        }
        m, v = [moments["momentum"]], [moments["second_moment"]]
        (direction,) = adam_direction(m, v, [gradient], bucket["betas"], bucket["eps"], bucket.t)
        for name, signed in IS_SIGNED.items():
            scale = moments[name].abs().amax(1, keepdim=True)
            # A block of zeros has the scale zero.
            indices = _quantise(moments[name] / scale.clamp_min(torch.finfo(scale.dtype).tiny), signed)
            torch._foreach_copy_(bucket.state(name), indices.split(counts))
            torch._foreach_copy_(bucket.state(f"{name}_scale"), scale.split(counts))
        return [
            blocks.reshape(-1)[: theta.numel()].view(theta.shape)
            for theta, blocks in zip(bucket.theta, direction.split(counts), strict=True)
        ]


def _dequantise(indices: Tensor, signed: bool, like: Tensor) -> Tensor:
    """The levels at `indices` (uint8), in their shape and in the dtype and on the device of `like`."""
    levels = _levels_like(signed, like.dtype, like.device)
    return levels.index_select(0, indices.view(-1).int()).view(indices.shape)


def _quantise(x: Tensor, signed: bool) -> Tensor:
    """uint8 of the shape of x: the index of the level nearest to each element, which is in [-1, 1].

    A table of the upper 16 bits gives the index up to one comparison, three times faster than a binary search.
    """
    first_indices, borders = _lookup_tables(signed, x.device)
    x = x.float()
    upper_bits = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1)
    index = first_indices.index_select(0, upper_bits)
    return (index + (borders.index_select(0, index) < x.view(-1))).to(torch.uint8).view(x.shape)


# Once per device, since a copy at every step would make the host wait for the device.
@cache
def _levels_like(signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    return quantisation_levels(signed).to(device, dtype)


@cache
def _lookup_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of every float32 the index of the smallest number with these bits, int32 [2^16]; and the
    borders between the levels, float32 [256], with infinity at the end.

    At most one border lies among the numbers with the same upper bits, so one comparison decides.
    """
    levels = quantisation_levels(signed).float()
    borders = (levels[1:] + levels[:-1]) / 2
    lowest_bits = (torch.arange(2**16) << 16).to(torch.int32)
    # For negative numbers the larger bit pattern is the smaller number. Patterns of NaN count as 0.
    smallest = torch.minimum(lowest_bits.view(torch.float32), (lowest_bits | 0xFFFF).view(torch.float32))
    smallest = smallest.nan_to_num(0.0)
    first_indices = torch.bucketize(smallest, borders, out_int32=True)
    return first_indices.to(device), torch.cat([borders, torch.tensor([torch.inf])]).to(device)


@cache
def quantisation_levels(signed: bool) -> Tensor:
    """The 256 levels of dynamic tree quantisation in increasing order, float64 [256]."""
    levels = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        for part in range(parts):
            middle = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade - 6)
            levels += [middle, -middle] if signed else [middle]
    return torch.tensor(sorted(levels), dtype=torch.float64)
