"""PSGD with a Kronecker-factored preconditioner that whitens the gradient: Li 2015, arXiv:1512.04202; Pooladzandi & Li
2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners", arXiv:2402.04553, in the form of the
released Kron. The preconditioner P = QᵀQ, Q = Q_R ⊗ Q_L with upper triangular factors, is fitted so that the
preconditioned momentum has the covariance I. For a matrix with momentum M [m, n] (bias-corrected average of gradients),
noise V ~ N(0, I), and A = Q_L M Q_Rᵀ, B = Q_L⁻ᵀ V Q_R⁻¹:

    Q_L ← Q_L - μ triu(A Aᵀ - B Bᵀ) Q_L / ‖A Aᵀ + B Bᵀ‖,   Q_R likewise with AᵀA, BᵀB
    U = Q_Lᵀ Q_L M Q_Rᵀ Q_R,   W ← W - η (U min(1, 1.1 / rms(U)) + λ W)

A lower bound replaces the spectral norm, as in the released code. The factors are updated at every step for 500 steps,
then less and less often, down to every 33rd step. Every hundredth update balances their scales; the released code does
so at random. A side longer than `max_size_triangular` gets a diagonal factor. AdamW trains all parameters but hidden
matrices and convolutions. State per matrix: mn + m² + n² numbers. Defaults: the released Kron's (lr 3e-4, momentum 0.9,
μ = 0.1).
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
from submissions.matrices import MatrixRule, MatrixSubmission, stack_state
from submissions.rule import Bucket

_BALANCE_EVERY = 100
"""Updates of the factors from one balancing to the next."""
_MAX_RMS = 1.1
"""Bound of the root mean square of a matrix's update."""
_DENSE_SIZE = 128
"""Triangular matrices of less than twice this size are multiplied as if they were full, which is faster."""


class PSGDKron(MatrixSubmission):
    """PSGD-Kron for hidden matrices and convolutions, with AdamW for the rest.

    precondition_lr: μ. min_update_probability: least share of steps that update the factors.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        precondition_lr: float = 0.1,
        min_update_probability: Annotated[float, Interval(gt=0, le=1)] = 0.03,
        max_size_triangular: PositiveInt = 8192,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        kron = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "precondition_lr": precondition_lr}
        kron |= {"min_update_probability": min_update_probability, "max_size_triangular": max_size_triangular}
        adamw = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
        super().__init__(setup, lambda groups: KronRule(groups, kron, setup.device_generator), adamw)


class KronRule(MatrixRule):
    """The update of the module docstring. State: `momentum`, Q_L as `factor_0` and Q_R as `factor_1`.

    generator: of the noise V, on the parameters' device.
    """

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
        # Deterministic: an update whenever the steps since the last one times the probability reach 1.
        for group in self.param_groups:
            group["since_fit"] += 1
            probability = update_probability(group["updates"], group["min_update_probability"])
            group["fit"] = group["since_fit"] * probability >= 1
            group["updates"] += 1
            if group["fit"]:
                group |= {"since_fit": 0, "fits": group["fits"] + 1}

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta = bucket["momentum"]
        m = stack_state(bucket, "momentum").lerp_(gradient, 1 - beta) / (1 - beta**bucket.t)
        left, right = stack_state(bucket, "factor_0"), stack_state(bucket, "factor_1")
        if bucket["fit"]:
            # Without it one factor could grow and the other shrink until they overflow; only their product matters.
            if bucket["fits"] % _BALANCE_EVERY == 0:
                _balance_factors(left, right)
            noise = torch.randn(m.shape, generator=self.generator, dtype=m.dtype, device=m.device)
            a = _multiply(right, _multiply(left, m).mT).mT
            b = _solve_transposed(right, _solve_transposed(left, noise).mT).mT
            _update_factor(left, a, b, bucket["precondition_lr"])
            _update_factor(right, a.mT, b.mT, bucket["precondition_lr"])
        update = _multiply(left, _multiply(left, m), transposed=True)
        update = _multiply(right, _multiply(right, update.mT), transposed=True).mT
        rms = update.square().mean((1, 2), keepdim=True).sqrt()
        return update * (_MAX_RMS / (rms + 1e-6)).clamp_max(1)


def update_probability(steps: int, smallest: float) -> float:
    """Share of steps that update the factors, after `steps` steps: 1 for 500 steps, then exponentially falling."""
    return min(1.0, max(smallest, math.exp(-0.001 * (steps - 500))))


# Factors q are upper triangular [n, d, d] or diagonal [n, d]; they are multiplied from the left with x [n, d, k].


def _multiply(q: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """q x, or qᵀ x if `transposed`."""
    if q.ndim == 2:
        return q.unsqueeze(2) * x
    half = q.shape[1] // 2
    if half < _DENSE_SIZE:
        return (q.mT if transposed else q) @ x
    # The zeros below the diagonal are skipped, which saves nearly half of the work.
    top, bottom = (
        _multiply(q[:, :half, :half], x[:, :half], transposed),
        _multiply(q[:, half:, half:], x[:, half:], transposed),
    )
    corner = q[:, :half, half:]
    if transposed:
        return torch.cat([top, bottom + corner.mT @ x[:, :half]], 1)
    return torch.cat([top + corner @ x[:, half:], bottom], 1)


def _multiply_triangular(t: Tensor, q: Tensor) -> Tensor:
    """t q for upper triangular t and q [n, d, d], without the zeros below the diagonals."""
    half = q.shape[1] // 2
    if half < _DENSE_SIZE:
        return t @ q
    corner = _multiply(t[:, :half, :half], q[:, :half, half:]) + t[:, :half, half:] @ q[:, half:, half:]
    product = torch.zeros_like(q)
    product[:, :half, :half] = _multiply_triangular(t[:, :half, :half], q[:, :half, :half])
    product[:, :half, half:] = corner
    product[:, half:, half:] = _multiply_triangular(t[:, half:, half:], q[:, half:, half:])
    return product


def _solve_transposed(q: Tensor, x: Tensor) -> Tensor:
    """q⁻ᵀ x."""
    return x / q.unsqueeze(2) if q.ndim == 2 else torch.linalg.solve_triangular(q.mT, x, upper=False)


def _update_factor(q: Tensor, a: Tensor, b: Tensor, rate: float) -> None:
    """The update of Q_L in the module docstring with μ = rate, in place; of Q_R with a and b transposed."""
    # Against a division by zero where a and b vanish.
    tiny = torch.finfo(q.dtype).tiny
    if q.ndim == 2:
        a_squared, b_squared = a.square().sum(2), b.square().sum(2)
        q.sub_(q * (a_squared - b_squared) * (rate / ((a_squared + b_squared).amax(1, keepdim=True) + tiny)))
    else:
        a_squared, b_squared = a @ a.mT, b @ b.mT
        scale = rate / (_norm_lower_bound(a_squared + b_squared) + tiny)
        q.sub_(_multiply_triangular((a_squared - b_squared).triu_(), q) * scale[:, None, None])


def _norm_lower_bound(matrix: Tensor) -> Tensor:
    """A lower bound [n] of the spectral norms of symmetric matrices A [n, d, d]: ‖A x‖, x along A's longest column."""
    # Scaled by the largest element, so that no square overflows.
    largest = torch.linalg.vector_norm(matrix, torch.inf, (1, 2)).clamp_min(torch.finfo(matrix.dtype).tiny)
    scaled = matrix / largest[:, None, None]
    longest = torch.linalg.vector_norm(scaled, dim=2).argmax(1)
    x = scaled @ scaled.take_along_dim(longest[:, None, None], 2)
    x = scaled @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return largest * torch.linalg.vector_norm(x, dim=(1, 2))


def _balance_factors(left: Tensor, right: Tensor) -> None:
    """Scale both factors so that their largest entries are equal, in place; their Kronecker product stays the same."""
    largest = [q.abs().flatten(1).amax(1) for q in (left, right)]
    ratio = (largest[1] / largest[0]).sqrt()
    left.mul_(ratio.reshape(-1, *[1] * (left.ndim - 1)))
    right.div_(ratio.reshape(-1, *[1] * (right.ndim - 1)))
