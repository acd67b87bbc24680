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

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from harness.submission import Setup
from submissions.list_rule import Group, update_moments
from submissions.matrices import MatrixRule, MatrixSubmission, as_tall, leading_right_vectors, zeros_of


class GaLore(MatrixSubmission):
    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        refresh_every: int = 200,
        scale: float = 0.25,
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
        density: float = 0.25,
        refresh_every: int = 200,
        sign_scale: float = 1.0,
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
        rank: int = 128,
        error_feedback: bool = True,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"rank": rank, "error_feedback": error_feedback}
        super().__init__(setup, lambda groups: DCTAdamWRule(groups, adam | own), adam)


class GaLoreRule(MatrixRule):
    def __init__(self, params: ParamsT, defaults: Group) -> None:
        _check_counts(defaults, "rank", "refresh_every")
        super().__init__(params, defaults)

    def direction(self, parameters: list[Tensor], gradient: Tensor, group: Group) -> Tensor:
        tall, transposed = as_tall(gradient)
        _, rows, columns = tall.shape
        rank = min(group["rank"], columns)
        basis = self.stacked(parameters, "basis", zeros_of(columns, rank))
        if (group["step"] - 1) % group["refresh_every"] == 0:
            basis.copy_(leading_right_vectors(tall, rank))
        m, v = (self.stacked(parameters, key, zeros_of(rows, rank)) for key in ("exp_avg", "exp_avg_sq"))
        (adam,) = update_moments([m], [v], [tall @ basis], group["betas"], group["eps"], group["step"])
        update = group["scale"] * adam @ basis.mT
        return update.mT if transposed else update


class FrugalRule(MatrixRule):
    def __init__(self, params: ParamsT, defaults: Group, generator: torch.Generator) -> None:
        _check_counts(defaults, "refresh_every")
        if not 0 < defaults["density"] <= 1:
            raise ValueError(f"density={defaults['density']}: must lie in (0, 1]; the share of columns with a state")
        self.generator = generator
        super().__init__(params, defaults)

    def direction(self, parameters: list[Tensor], gradient: Tensor, group: Group) -> Tensor:
        n, rows, columns = gradient.shape
        count = max(1, round(group["density"] * columns))
        chosen = self.stacked(parameters, "columns", lambda p: torch.zeros(count, dtype=torch.int64, device=p.device))
        m, v = (self.stacked(parameters, key, zeros_of(rows, count)) for key in ("exp_avg", "exp_avg_sq"))
        since = (group["step"] - 1) % group["refresh_every"]
        if since == 0:
            order = torch.rand(n, columns, generator=self.generator, device=gradient.device).argsort(dim=1)
            chosen.copy_(order[:, :count].sort(dim=1).values)
            m.zero_()
            v.zero_()
        index = chosen.unsqueeze(1).expand(n, rows, count)
        (adam,) = update_moments([m], [v], [gradient.gather(2, index)], group["betas"], group["eps"], since + 1)
        return (group["sign_scale"] * gradient.sign()).scatter_(2, index, adam)


class DCTAdamWRule(MatrixRule):
    def __init__(self, params: ParamsT, defaults: Group) -> None:
        _check_counts(defaults, "rank")
        super().__init__(params, defaults)

    def direction(self, parameters: list[Tensor], gradient: Tensor, group: Group) -> Tensor:
        tall, transposed = as_tall(gradient)
        _, rows, columns = tall.shape
        rank = min(group["rank"], columns)
        dct = self.shared(f"dct_{columns}", lambda: dct_basis(columns, tall))
        m, v = (self.stacked(parameters, key, zeros_of(rows, rank)) for key in ("exp_avg", "exp_avg_sq"))
        chosen = self.stacked(parameters, "columns", lambda p: torch.arange(rank, device=p.device))
        if group["error_feedback"]:
            tall = tall + self.stacked(parameters, "error", zeros_of(rows, columns))
        transformed = tall @ dct
        now = transformed.abs().sum(1).topk(rank, dim=1).indices.sort(dim=1).values
        stayed = (chosen.unsqueeze(2) == now.unsqueeze(1)).to(tall.dtype)
        m.copy_(m @ stayed)
        v.copy_(v @ stayed)
        chosen.copy_(now)
        projected = transformed.gather(2, now.unsqueeze(1).expand(-1, rows, -1))
        basis = dct[:, now].movedim(1, 0)
        if group["error_feedback"]:
            self.stacked(parameters, "error").copy_(tall - projected @ basis.mT)
        (adam,) = update_moments([m], [v], [projected], group["betas"], group["eps"], group["step"])
        update = adam @ basis.mT
        return update.mT if transposed else update


def dct_basis(size: int, like: Tensor) -> Tensor:
    """Orthonormal [size, size]; column j is the cosine of frequency j (DCT-II)."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (place + 0.5).unsqueeze(1) * place) * (2 / size) ** 0.5
    basis[:, 0] /= 2**0.5
    return basis.to(like)


def _check_counts(hyperparameters: Group, *names: str) -> None:
    for name in names:
        if hyperparameters[name] < 1:
            raise ValueError(f"{name}={hyperparameters[name]}: must be at least 1")
