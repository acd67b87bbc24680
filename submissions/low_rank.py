"""Rules whose state lives in a subspace of each matrix's gradient G [m, n], m ≥ n (transposed where it is not).

GaLore: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507,
Algorithm 2: Adam on G Q, with the r leading right singular vectors Q of G taken anew every T steps, and

    W ← (1 - η λ) W - η α Adam(G Q) Qᵀ

FRUGAL: Zmushko et al. 2024, "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
arXiv:2411.07837, Algorithm 1, with random columns as the subspace (RandK): Adam on a share ρ of the columns, drawn anew
every T steps with its moments reset, and signSGD on all others with `sign_scale` times the learning rate.

DCT-AdamW: Modoranu et al. 2025, "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
arXiv:2505.17967, Algorithm 2: the subspace are the r columns of the orthonormal DCT basis D in which G D is largest
(sums of absolute values), chosen at every step. Moments of columns that stay chosen stay, those of new columns start at
zero (that is the paper's rotation by Q_prevᵀ Q_new, which for columns of one orthonormal D only picks). What the
projection loses is added to the next gradient (error feedback, which can be switched off).

Embeddings, head, norms and biases are trained by AdamW with the same hyperparameters, as in all three papers.

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
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_vectors, stacked, tall
from submissions.rule import Bucket, adam_direction


class GaLore(MatrixSubmission):
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
        own = {"rank": rank, "refresh_every": refresh_every, "scale": scale}
        super().__init__(setup, lambda groups: GaLoreRule(groups, adam | own), adam)


class Frugal(MatrixSubmission):
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
        own = {"density": density, "refresh_every": refresh_every, "sign_scale": sign_scale}
        super().__init__(setup, lambda groups: FrugalRule(groups, adam | own, setup.device_generator), adam)


class DCTAdamW(MatrixSubmission):
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
        own = {"rank": rank, "error_feedback": error_feedback}
        super().__init__(setup, lambda groups: DCTAdamWRule(groups, adam | own), adam)


class GaLoreRule(MatrixRule):
    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = tall(theta)[0].shape
        rank = min(group["rank"], columns)
        return {"basis": theta.new_zeros(columns, rank)} | _moments(theta, rows, rank)

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = tall(gradient)
        basis = stacked(bucket, "basis")
        if (bucket.t - 1) % bucket["refresh_every"] == 0:
            basis.copy_(leading_right_vectors(g, basis.shape[2]))
        return _expanded(bucket["scale"] * _adam(bucket, g @ basis, bucket.t), basis, transposed)


class FrugalRule(MatrixRule):
    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any], generator: torch.Generator) -> None:
        super().__init__(params, hyperparameters)
        self.generator = generator

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = theta.shape
        count = min(columns, max(1, round(group["density"] * columns)))
        chosen = torch.zeros(count, dtype=torch.int64, device=theta.device)
        return {"columns": chosen} | _moments(theta, rows, count)

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        n, rows, columns = gradient.shape
        chosen, since = stacked(bucket, "columns"), (bucket.t - 1) % bucket["refresh_every"]
        if since == 0:
            order = torch.rand(n, columns, generator=self.generator, device=gradient.device).argsort(dim=1)
            chosen.copy_(order[:, : chosen.shape[1]].sort(dim=1).values)
            for name in ("momentum", "second_moment"):
                stacked(bucket, name).zero_()
        index = chosen.unsqueeze(1).expand(-1, rows, -1)
        update = _adam(bucket, gradient.gather(2, index), since + 1)
        return (bucket["sign_scale"] * gradient.sign()).scatter_(2, index, update)


class DCTAdamWRule(MatrixRule):
    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rows, columns = tall(theta)[0].shape
        rank = min(group["rank"], columns)
        state = {"columns": torch.arange(rank, device=theta.device)} | _moments(theta, rows, rank)
        return state | ({"error": theta.new_zeros(rows, columns)} if group["error_feedback"] else {})

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        g, transposed = tall(gradient)
        _, rows, columns = g.shape
        dct = self.shared(f"dct_{columns}", lambda: dct_basis(columns, g))
        chosen = stacked(bucket, "columns")
        if bucket["error_feedback"]:
            g = g + stacked(bucket, "error")
        transformed = g @ dct
        now = transformed.abs().sum(1).topk(chosen.shape[1], dim=1).indices.sort(dim=1).values
        stayed = (chosen.unsqueeze(2) == now.unsqueeze(1)).to(g.dtype)
        for name in ("momentum", "second_moment"):
            moment = stacked(bucket, name)
            moment.copy_(moment @ stayed)
        chosen.copy_(now)
        projected = transformed.gather(2, now.unsqueeze(1).expand(-1, rows, -1))
        basis = dct[:, now].movedim(1, 0)
        if bucket["error_feedback"]:
            stacked(bucket, "error").copy_(g - projected @ basis.mT)
        return _expanded(_adam(bucket, projected, bucket.t), basis, transposed)


def _moments(theta: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    return {name: theta.new_zeros(rows, columns) for name in ("momentum", "second_moment")}


def _expanded(direction: Tensor, basis: Tensor, transposed: bool) -> Tensor:
    """direction basisᵀ, as it lies in the memory of a gradient that was transposed to be tall."""
    return basis @ direction.mT if transposed else direction @ basis.mT


def _adam(bucket: Bucket, g: Tensor, t: int) -> Tensor:
    momentum, second_moment = stacked(bucket, "momentum"), stacked(bucket, "second_moment")
    return adam_direction([momentum], [second_moment], [g], bucket["betas"], bucket["eps"], t)[0]


def dct_basis(size: int, like: Tensor) -> Tensor:
    """Orthonormal [size, size]; column j is the cosine of frequency j (DCT-II)."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (place + 0.5).unsqueeze(1) * place) * (2 / size) ** 0.5
    basis[:, 0] /= 2**0.5
    return basis.to(like)
