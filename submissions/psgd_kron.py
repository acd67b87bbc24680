"""PSGD with a Kronecker-factored preconditioner, whitening the gradient: Li 2015, arXiv:1512.04202; Pooladzandi & Li
2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", arXiv:2402.04553, in the form of the
released Kron. The preconditioner P = QᵀQ, Q = Q_R ⊗ Q_L with upper triangular factors, is fitted so that the
preconditioned momentum has the covariance I. For a matrix with momentum M [m, n] (bias-corrected average of gradients),
noise V ~ N(0, I), and A = Q_L M Q_Rᵀ, B = Q_L⁻ᵀ V Q_R⁻¹:

    Q_L ← Q_L - μ triu(A Aᵀ - B Bᵀ) Q_L / ‖A Aᵀ + B Bᵀ‖,   Q_R alike with AᵀA, BᵀB
    U = Q_Lᵀ Q_L M Q_Rᵀ Q_R,   W ← W - η (U min(1, 1.1 / rms(U)) + λ W)

The spectral norm is a lower bound of it, as released. The factors are updated at every step for 500 steps, then less
often, down to every 33rd step; every hundredth update brings them to one scale (the released code does that at random).
A side longer than `max_size_triangular` gets a diagonal factor. State per matrix: mn + m² + n² numbers. Defaults: the
released Kron's (lr 1e-3, momentum 0.9, μ = 0.1). AdamW trains what is no hidden matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, stacked
from submissions.rule import Bucket

_BALANCE_EVERY = 100
_MAX_RMS = 1.1
_DENSE = 128
"""Triangular matrices up to twice this size are multiplied as if they were full."""


class PSGDKron(MatrixSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        precondition_lr: float = 0.1,
        min_update_probability: Annotated[float, Interval(gt=0, le=1)] = 0.03,
        max_size_triangular: PositiveInt = 8192,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "precondition_lr": precondition_lr}
        own |= {"min_update_probability": min_update_probability, "max_size_triangular": max_size_triangular}
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: KronRule(groups, own, setup.device_generator), adamw)


class KronRule(MatrixRule):
    buffers = ("momentum",)

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any], generator: torch.Generator) -> None:
        super().__init__(params, hyperparameters | {"updates": 0, "since_fit": 0, "fits": 0})
        self.generator = generator

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        def identity(size: int) -> Tensor:
            diagonal = size == 1 or size > group["max_size_triangular"]
            return theta.new_ones(size) if diagonal else torch.eye(size, dtype=theta.dtype, device=theta.device)

        factors = {f"factor_{side}": identity(size) for side, size in enumerate(theta.shape)}
        return super().initial_state(theta, g, group) | factors

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        for group in self.param_groups:
            group["since_fit"] += 1
            group["fit"] = (
                group["since_fit"] * update_probability(group["updates"], group["min_update_probability"]) >= 1
            )
            group["updates"] += 1
            if group["fit"]:
                group |= {"since_fit": 0, "fits": group["fits"] + 1}

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta = bucket["momentum"]
        m = stacked(bucket, "momentum").lerp_(gradient, 1 - beta) / (1 - beta**bucket.t)
        left, right = stacked(bucket, "factor_0"), stacked(bucket, "factor_1")
        if bucket["fit"]:
            if bucket["fits"] % _BALANCE_EVERY == 0:
                _balance(left, right)
            noise = torch.randn(m.shape, generator=self.generator, dtype=m.dtype, device=m.device)
            a = _times(right, _times(left, m).mT).mT
            b = _inverse_transposed_times(right, _inverse_transposed_times(left, noise).mT).mT
            _fit(left, a, b, bucket["precondition_lr"])
            _fit(right, a.mT, b.mT, bucket["precondition_lr"])
        update = _times(left, _times(left, m), transposed=True)
        update = _times(right, _times(right, update.mT), transposed=True).mT
        rms = update.square().mean((1, 2), keepdim=True).sqrt()
        return update * (_MAX_RMS / (rms + 1e-6)).clamp_max(1)


def update_probability(steps: int, smallest: float) -> float:
    """Share of steps that fit the factors, after `steps` steps: all of the first 500, then exponentially fewer."""
    return min(1.0, max(smallest, math.exp(-0.001 * (steps - 500))))


# Factors q [n, d, d] are upper triangular, or [n, d] diagonal; they act from the left on x [n, d, k].


def _times(q: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    if q.ndim == 2:
        return q.unsqueeze(2) * x
    half = q.shape[1] // 2
    if half < _DENSE:
        return (q.mT if transposed else q) @ x
    # The zeros below the diagonal are left out, which saves nearly half of the work.
    first, second = (
        _times(q[:, :half, :half], x[:, :half], transposed),
        _times(q[:, half:, half:], x[:, half:], transposed),
    )
    corner = q[:, :half, half:]
    if transposed:
        return torch.cat([first, second + corner.mT @ x[:, :half]], 1)
    return torch.cat([first + corner @ x[:, half:], second], 1)


def _product(t: Tensor, q: Tensor) -> Tensor:
    """t q of two upper triangular matrices."""
    half = q.shape[1] // 2
    if half < _DENSE:
        return t @ q
    corner = _times(t[:, :half, :half], q[:, :half, half:]) + t[:, :half, half:] @ q[:, half:, half:]
    product = torch.zeros_like(q)
    product[:, :half, :half] = _product(t[:, :half, :half], q[:, :half, :half])
    product[:, :half, half:] = corner
    product[:, half:, half:] = _product(t[:, half:, half:], q[:, half:, half:])
    return product


def _inverse_transposed_times(q: Tensor, x: Tensor) -> Tensor:
    return x / q.unsqueeze(2) if q.ndim == 2 else torch.linalg.solve_triangular(q.mT, x, upper=False)


def _fit(q: Tensor, a: Tensor, b: Tensor, rate: float) -> None:
    tiny = torch.finfo(q.dtype).tiny
    if q.ndim == 2:
        target, noise = a.square().sum(2), b.square().sum(2)
        q.sub_(q * (target - noise) * (rate / ((target + noise).amax(1, keepdim=True) + tiny)))
    else:
        target, noise = a @ a.mT, b @ b.mT
        scale = rate / (_norm_lower_bound(target + noise) + tiny)
        q.sub_(_product((target - noise).triu_(), q) * scale[:, None, None])


def _norm_lower_bound(matrix: Tensor) -> Tensor:
    """‖A x‖ for x along the longest column of A: at most the spectral norm of the symmetric matrices A [n, d, d]."""
    largest = torch.linalg.vector_norm(matrix, torch.inf, (1, 2)).clamp_min(torch.finfo(matrix.dtype).tiny)
    scaled = matrix / largest[:, None, None]
    longest = torch.linalg.vector_norm(scaled, dim=2).argmax(1)
    x = scaled @ scaled.take_along_dim(longest[:, None, None], 2)
    x = scaled @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return largest * torch.linalg.vector_norm(x, dim=(1, 2))


def _balance(left: Tensor, right: Tensor) -> None:
    """The largest entries of both factors become equal, which leaves the product as it is."""
    sizes = [q.abs().flatten(1).amax(1) for q in (left, right)]
    ratio = (sizes[1] / sizes[0]).sqrt()
    left.mul_(ratio.reshape(-1, *[1] * (left.ndim - 1)))
    right.div_(ratio.reshape(-1, *[1] * (right.ndim - 1)))
