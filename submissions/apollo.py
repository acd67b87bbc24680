"""Full-rank steps whose lengths come from Adam in a subspace of each matrix's gradient G [m, n], m ≥ n (transposed
otherwise). With a projection P [n, r] that is renewed every T steps, and R = G P:

APOLLO: Zhu et al. 2025, "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, arXiv:2412.05270, Algorithm 1.
P is random, N(0, 1/r); s is one factor per row, or with `per_tensor` (APOLLO-Mini, r = 1) one per matrix:

    s = ‖Adam(R)‖ / ‖R‖,   U = α s G

Fira: Chen et al. 2025, "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv:2410.01623.
P are the leading right singular vectors of G; what they leave out is scaled by the same factors:

    U = α Adam(R) Pᵀ + s (G - α R Pᵀ)

Both limit growth: APOLLO's U, and Fira's second term, are scaled down to 1.01 times the norm of their predecessor. The
step is W ← W - η (U + λ W). AdamW trains embeddings, head, norms and biases with the same hyperparameters.

State per matrix: nr + 2mr numbers and a norm. Defaults: APOLLO r = 256, α = 1, T = 200; APOLLO-Mini r = 1, α = √128;
Fira r = 128, α = 0.25, T = 200. Adam's are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Setup
from submissions.low_rank import adam_in_subspace, expand, zero_moments
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.rule import Bucket

GROWTH = 1.01
TINY = 1e-30


class Apollo(MatrixSubmission):
    """APOLLO for hidden matrices and convolutions. rank: r. refresh_every: T. scale: α."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: PositiveInt = 256,
        refresh_every: PositiveInt = 200,
        scale: PositiveFloat = 1.0,
        per_tensor: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        apollo = {"rank": rank, "refresh_every": refresh_every, "scale": scale, "per_tensor": per_tensor}
        super().__init__(setup, lambda groups: ApolloRule(groups, adam | apollo, setup.device_generator), adam)


class Fira(MatrixSubmission):
    """Fira for hidden matrices and convolutions. rank: r. refresh_every: T. scale: α."""

    host_waits = "every T steps, for singular vectors"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: PositiveInt = 128,
        refresh_every: PositiveInt = 200,
        scale: PositiveFloat = 0.25,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        fira = {"rank": rank, "refresh_every": refresh_every, "scale": scale}
        super().__init__(setup, lambda groups: FiraRule(groups, adam | fira), adam)


class _ScaledRule(MatrixRule):
    """The common state: P as `basis`, Adam's moments [m, r], and the norm that limits the next one."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = to_tall(theta)[0].shape
        rank = min(group["rank"], columns)
        state = {"basis": theta.new_zeros(columns, rank), "last_norm": theta.new_zeros(1, 1)}
        return state | zero_moments(theta, rows, rank)


class ApolloRule(_ScaledRule):
    """APOLLO's update. generator: draws the projections, on the parameters' device."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any], generator: torch.Generator) -> None:
        super().__init__(params, hyperparameters)
        self.generator = generator

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, _ = to_tall(gradient)
        basis = stack_state(bucket, "basis")
        if (bucket.t - 1) % bucket["refresh_every"] == 0:
            drawn = torch.randn(basis.shape, generator=self.generator, device=g.device)
            # Adam's moments are kept although they belong to the old projection, as in the paper.
            basis.copy_(drawn / basis.shape[2] ** 0.5)
        projected = g @ basis
        adam = adam_in_subspace(bucket, projected, bucket.t)
        factors = _norms(adam, bucket["per_tensor"]) / _norms(projected, bucket["per_tensor"]).clamp_min(TINY)
        update = limit_growth_(stack_state(bucket, "last_norm"), g * factors * bucket["scale"])
        return update if g is gradient else update.mT


class FiraRule(_ScaledRule):
    """Fira's update."""

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = to_tall(gradient)
        basis = stack_state(bucket, "basis")
        if (bucket.t - 1) % bucket["refresh_every"] == 0:
            basis.copy_(leading_right_singular_vectors(g, basis.shape[2]))
        projected = g @ basis
        adam = adam_in_subspace(bucket, projected, bucket.t)
        factors = _norms(adam, False) / _norms(projected, False).clamp_min(TINY)
        rest = factors * (g - bucket["scale"] * (projected @ basis.mT))
        limited = limit_growth_(stack_state(bucket, "last_norm"), rest)
        within = expand(bucket["scale"] * adam, basis, transposed)
        return within + (limited.mT if transposed else limited)


def limit_growth_(last_norm: Tensor, update: Tensor) -> Tensor:
    """Updates [n, m, n'] scaled down to GROWTH times the norms before, which become theirs, in place; a norm of zero
    limits nothing."""
    norm = _norms(update, True)
    limit = GROWTH * last_norm
    factor = torch.where((last_norm > 0) & (norm > limit), limit / norm.clamp_min(TINY), 1.0)
    last_norm.copy_(norm * factor)
    return update * factor


def _norms(matrix: Tensor, per_tensor: bool) -> Tensor:
    """Norms of whole matrices, [n, 1, 1], or of their rows, [n, m, 1]."""
    if per_tensor:
        return torch.linalg.matrix_norm(matrix, keepdim=True)
    return torch.linalg.vector_norm(matrix, dim=2, keepdim=True)
