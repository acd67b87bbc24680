"""Rules with state in a subspace of each matrix's gradient G [m, n], m ≥ n (transposed otherwise).

GaLore: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507,
Algorithm 2. Adam on G Q, where Q are the r leading right singular vectors of G, recomputed every T steps:

    W ← (1 - η λ) W - η α Adam(G Q) Qᵀ

FRUGAL: Zmushko et al. 2024, "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
arXiv:2411.07837, Algorithm 1, with random columns as the subspace (RandK). Adam on a share ρ of the columns, which are
redrawn every T steps and then start with zero moments; signSGD on the other columns with `sign_scale` times the
learning rate.

DCT-AdamW: Modoranu et al. 2025, "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
arXiv:2505.17967, Algorithm 2. The subspace is spanned by r columns of the orthonormal DCT basis D: at every step those
for which the columns of G D have the largest sums of absolute values. Moments of columns that remain selected are kept;
those of new columns start at zero. (This is the paper's rotation by Q_prevᵀ Q_new, which for columns of one orthonormal
D only selects.) The part of the gradient outside the subspace is added to the next gradient (error feedback, optional).

AdamW trains embeddings, head, norms and biases with the same hyperparameters, as in all three papers.

State per matrix: GaLore r (2m + n) numbers; FRUGAL 2ρmn and the indices; DCT-AdamW 2rm, the indices, and mn of error
feedback; D once per size. Defaults: GaLore T = 200, α = 0.25, r = 128 for 60M to 130M parameters; FRUGAL ρ = 0.25,
T = 200; DCT-AdamW r = 128. Adam's are torch's.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.rule import Bucket, adam_direction


class GaLore(MatrixSubmission):
    """GaLore for hidden matrices and convolutions. rank: r. refresh_every: T. scale: α."""

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
        galore = {"rank": rank, "refresh_every": refresh_every, "scale": scale}
        super().__init__(setup, lambda groups: GaLoreRule(groups, adam | galore), adam)


class Frugal(MatrixSubmission):
    """FRUGAL for hidden matrices and convolutions. density: ρ. refresh_every: T."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: Annotated[float, Interval(gt=0, le=1)] = 0.25,
        refresh_every: PositiveInt = 200,
        sign_scale: NonNegativeFloat = 1.0,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        frugal = {"density": density, "refresh_every": refresh_every, "sign_scale": sign_scale}
        super().__init__(setup, lambda groups: FrugalRule(groups, adam | frugal, setup.device_generator), adam)


class DCTAdamW(MatrixSubmission):
    """DCT-AdamW for hidden matrices and convolutions. rank: r."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: PositiveInt = 128,
        error_feedback: bool = True,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        dct = {"rank": rank, "error_feedback": error_feedback}
        super().__init__(setup, lambda groups: DCTAdamWRule(groups, adam | dct), adam)


class GaLoreRule(MatrixRule):
    """GaLore's update. State per matrix: `basis` [n, r] and Adam's moments [m, r]."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = to_tall(theta)[0].shape
        rank = min(group["rank"], columns)
        return {"basis": theta.new_zeros(columns, rank)} | zero_moments(theta, rows, rank)

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = to_tall(gradient)
        basis = stack_state(bucket, "basis")
        if (bucket.t - 1) % bucket["refresh_every"] == 0:
            # The moments are kept although they belong to the old basis, as in the paper.
            basis.copy_(leading_right_singular_vectors(g, basis.shape[2]))
        return expand(bucket["scale"] * adam_in_subspace(bucket, g @ basis, bucket.t), basis, transposed)


class FrugalRule(MatrixRule):
    """FRUGAL's update. State per matrix: the indices of the `columns` and their moments [rows, selected columns].

    generator: draws the columns, on the parameters' device.
    """

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any], generator: torch.Generator) -> None:
        super().__init__(params, hyperparameters)
        self.generator = generator

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = theta.shape
        count = min(columns, max(1, round(group["density"] * columns)))
        selected = torch.zeros(count, dtype=torch.int64, device=theta.device)
        return {"columns": selected} | zero_moments(theta, rows, count)

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        n, rows, columns = gradient.shape
        selected = stack_state(bucket, "columns")
        steps_since_refresh = (bucket.t - 1) % bucket["refresh_every"]
        if steps_since_refresh == 0:
            order = torch.rand(n, columns, generator=self.generator, device=gradient.device).argsort(dim=1)
            # Sorted, so that gathering reads the memory in order.
            selected.copy_(order[:, : selected.shape[1]].sort(dim=1).values)
            for name in ("momentum", "second_moment"):
                stack_state(bucket, name).zero_()
        index = selected.unsqueeze(1).expand(-1, rows, -1)
        # The moments were reset, so their bias correction counts from the refresh.
        update = adam_in_subspace(bucket, gradient.gather(2, index), steps_since_refresh + 1)
        return (bucket["sign_scale"] * gradient.sign()).scatter_(2, index, update)


class DCTAdamWRule(MatrixRule):
    """DCT-AdamW's update. State per matrix: the indices of the `columns`, moments [m, r] and the `error` [m, n]."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = to_tall(theta)[0].shape
        rank = min(group["rank"], columns)
        state = {"columns": torch.arange(rank, device=theta.device)} | zero_moments(theta, rows, rank)
        return state | ({"error": theta.new_zeros(rows, columns)} if group["error_feedback"] else {})

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = to_tall(gradient)
        _, rows, columns = g.shape
        # One basis for all matrices with this number of columns.
        dct = self.shared(f"dct_{columns}", lambda: dct_basis(columns, g))
        previous = stack_state(bucket, "columns")
        if bucket["error_feedback"]:
            g = g + stack_state(bucket, "error")
        transformed = g @ dct
        selected = transformed.abs().sum(1).topk(previous.shape[1], dim=1).indices.sort(dim=1).values
        # Q_prevᵀ Q_new: 1 where a previous column is selected again, so that the product moves its moments along.
        rotation = (previous.unsqueeze(2) == selected.unsqueeze(1)).to(g.dtype)
        for name in ("momentum", "second_moment"):
            moment = stack_state(bucket, name)
            moment.copy_(moment @ rotation)
        previous.copy_(selected)
        projected = transformed.gather(2, selected.unsqueeze(1).expand(-1, rows, -1))
        basis = dct[:, selected].movedim(1, 0)
        if bucket["error_feedback"]:
            stack_state(bucket, "error").copy_(g - projected @ basis.mT)
        return expand(adam_in_subspace(bucket, projected, bucket.t), basis, transposed)


def zero_moments(theta: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Adam's two moments as zeros [rows, columns]."""
    return {name: theta.new_zeros(rows, columns) for name in ("momentum", "second_moment")}


def expand(direction: Tensor, basis: Tensor, transposed: bool) -> Tensor:
    """direction basisᵀ in the shape of the gradient, which `to_tall` may have transposed."""
    return basis @ direction.mT if transposed else direction @ basis.mT


def adam_in_subspace(bucket: Bucket, g: Tensor, t: int) -> Tensor:
    """Adam's direction for projected gradients g [n, rows, rank], after t steps of its moments."""
    momentum, second_moment = stack_state(bucket, "momentum"), stack_state(bucket, "second_moment")
    return adam_direction([momentum], [second_moment], [g], bucket["betas"], bucket["eps"], t)[0]


def dct_basis(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II basis [size, size], column j of frequency j, in the dtype and on the device of `like`."""
    index = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (index + 0.5).unsqueeze(1) * index) * (2 / size) ** 0.5
    basis[:, 0] /= 2**0.5
    return basis.to(like)
