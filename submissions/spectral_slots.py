"""The parts of Muon's family around the map of the spectrum (submissions/polar.py): what is done to the momentum before
it, and to the result after it. Each is a `Slot`; `BEFORE` and `AFTER` name them.

Before, for a momentum M and a gradient G, with moving averages of decay β2:

    sign          sign(M)                                                AdaMuon, arXiv:2507.11005
    row, column   M with rows (columns) of norm 1                        MuonEq, arXiv:2603.28254
    elementwise   M / (√v + ε), v the average of G²                      Muon², arXiv:2604.09967
    kronecker     L^-γ M R^-γ, L and R the averages of G Gᵀ and Gᵀ G     PMuon, modded-nanogpt track 3, result 18
    eigenbasis    Q_L (N / (√v + ε)) Q_Rᵀ with N = Q_Lᵀ M Q_R, v the average of N², Q_L and Q_R the eigenvectors of
                  L and R                                                SOAP-Muon, modded-nanogpt track 3, result 44

After, for the map's result O, whose Frobenius norm they keep but for the last two:

    row           O / (√v + ε), v the average of the mean of O² over each row     NorMuon, arXiv:2510.05491
    elementwise   O / (√v + ε), v the average of O²                      AdaMuon
    renorm        O with rows of equal norm                              Muon+, arXiv:2602.21545
    scalar        α O, α = (‖M‖ / (1 - μ^t)) / (√(v / (1 - β2^t)) + ε), v the average of ‖G‖²     NAMO, arXiv:2602.17080
    accumulated   max(floor, min(‖G‖, γ) / √v) O, v the sum of min(‖G‖², γ²)      AdaGO, arXiv:2509.02981

Weight decay is not multiplied by NAMO's α, as in its paper, but like that of the others. AdaGO's floor is a share of
the learning rate, so that it falls with the schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from submissions.matrices import eigendecomposition, stack_state, zero_square
from submissions.rule import Bucket
from submissions.soap import refresh_basis, rotate

TINY = 1e-30
"""A bound below norms that are divided by, so that zero matrices stay zero."""


class Slot:
    """What happens to matrices before or after the map of their spectrum; this base changes nothing."""

    waits = ""
    """As `submissions.rule.Rule.host_waits`."""

    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        """State of a parameter [rows, columns] before its first step."""
        return {}

    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        """matrix: what the slot changes, [n, rows, columns], as momentum and gradient are. Returns the result; state is
        changed in place."""
        return matrix


class Sign(Slot):
    """Signs of the momentum."""

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        return matrix.sign()


class UnitRows(Slot):
    """Rows of norm 1; columns with dim=1."""

    def __init__(self, dim: int = 2) -> None:
        self.dim = dim

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        return matrix / torch.linalg.vector_norm(matrix, dim=self.dim, keepdim=True).clamp_min(TINY)


class ElementwiseMoment(Slot):
    """M / (√v + ε). Not corrected for bias, which would not change the polar factor."""

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {"second_moment": torch.zeros_like(theta)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v = stack_state(bucket, "second_moment")
        v.mul_(bucket["beta2"]).addcmul_(gradient, gradient, value=1 - bucket["beta2"])
        return matrix / (v.sqrt() + bucket["eps"])


class Kronecker(Slot):
    """L^-γ M R^-γ. γ is `kronecker_power`; the powers are computed every `precondition_frequency` steps."""

    waits = "every f steps, for eigendecompositions"

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {f"{name}_{side}": zero_square(theta, side) for name in ("covariance", "root") for side in (0, 1)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        roots = []
        for side in (0, 1):
            covariance, root = stack_state(bucket, f"covariance_{side}"), stack_state(bucket, f"root_{side}")
            average_covariance_(covariance, gradient, side, bucket["beta2"])
            if (bucket.t - 1) % bucket["precondition_frequency"] == 0:
                values, vectors = eigendecomposition(covariance)
                # Relative, since the scale of the covariance does not change the polar factor.
                powers = (values.clamp_min(0) + bucket["eps"] * values[:, :1] + TINY) ** -bucket["kronecker_power"]
                root.copy_((vectors * powers.unsqueeze(1)) @ vectors.mT)
            roots.append(root)
        return roots[0] @ matrix @ roots[1]


class Eigenbasis(Slot):
    """Adam's scaling of the momentum in the eigenbasis of L and R, which each step, or each `precondition_frequency`
    steps, brings nearer by one step of power iteration. The first step only makes the bases."""

    waits = "at its first step, for an eigendecomposition"

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        squares = {f"{name}_{side}": zero_square(theta, side) for name in ("covariance", "basis") for side in (0, 1)}
        return squares | {"second_moment": torch.zeros_like(theta)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v = stack_state(bucket, "second_moment")
        bases = {side: stack_state(bucket, f"basis_{side}") for side in (0, 1)}
        covariances = {side: stack_state(bucket, f"covariance_{side}") for side in (0, 1)}
        result = matrix
        if bucket.t > 1:
            rotated = rotate(matrix, bases)
            v.mul_(bucket["beta2"]).addcmul_(rotated, rotated, value=1 - bucket["beta2"])
            result = rotate(rotated / (v.sqrt() + bucket["eps"]), bases, inverse=True)
        for side, covariance in covariances.items():
            average_covariance_(covariance, gradient, side, bucket["beta2"])
            if bucket.t == 1:
                bases[side].copy_(eigendecomposition(covariance)[1])
        if bucket.t > 1 and (bucket.t - 1) % bucket["precondition_frequency"] == 0:
            for side, basis in bases.items():
                refresh_basis(basis, covariances[side], v, side)
        return result


class RowMoment(Slot):
    """O / (√v + ε), with one v per row."""

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {"row_moment": theta.new_zeros(len(theta), 1)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v = stack_state(bucket, "row_moment")
        return normalise_rows_(v, matrix, bucket["beta2"], bucket["eps"])


class ElementwiseAfter(Slot):
    """O / (√v + ε), with one v per element. Its bias does not change the result, whose norm is that of O."""

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {"update_moment": torch.zeros_like(theta)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v = stack_state(bucket, "update_moment")
        v.mul_(bucket["beta2"]).addcmul_(matrix, matrix, value=1 - bucket["beta2"])
        return keep_norm(matrix / (v.sqrt() + bucket["eps"]), matrix)


class Renorm(UnitRows):
    """Rows of equal norm."""

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        return keep_norm(super().apply(bucket, matrix, momentum, gradient), matrix)


class ScalarMoment(Slot):
    """α O with Adam's scale of whole matrices."""

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {"scale_moment": theta.new_zeros(1, 1)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v, mu, beta2 = stack_state(bucket, "scale_moment"), bucket["momentum"], bucket["beta2"]
        v.lerp_(_norm(gradient).square(), 1 - beta2)
        denominator = (v / (1 - beta2**bucket.t)).sqrt() + bucket["eps"]
        return matrix * (_norm(momentum) / (1 - mu**bucket.t) / denominator)


class AccumulatedNorm(Slot):
    """AdaGrad's scale of whole matrices, from norms that are cut at `norm_limit`; at least `step_floor`."""

    @override
    def initial_state(self, theta: Tensor) -> dict[str, Tensor]:
        return {"norm_sum": theta.new_zeros(1, 1)}

    @override
    def apply(self, bucket: Bucket, matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
        v, norm = stack_state(bucket, "norm_sum"), _norm(gradient).clamp_max(bucket["norm_limit"])
        v.add_(norm.square())
        return matrix * (norm / v.sqrt().clamp_min(TINY)).clamp_min(bucket["step_floor"])


def average_covariance_(covariance: Tensor, gradient: Tensor, side: int, beta: float) -> None:
    """C ← β C + (1 - β) G Gᵀ (side 0) or Gᵀ G (side 1), in place; for matrices [n, ...]."""
    covariance.lerp_(gradient @ gradient.mT if side == 0 else gradient.mT @ gradient, 1 - beta)


def normalise_rows_(v: Tensor, matrix: Tensor, beta2: float, eps: float) -> Tensor:
    """NorMuon's scaling of the rows of [n, rows, columns], with the norm kept; v [n, rows, 1] is averaged in place."""
    v.lerp_(matrix.square().mean(2, keepdim=True), 1 - beta2)
    return keep_norm(matrix / (v.sqrt() + eps), matrix)


def keep_norm(matrix: Tensor, like: Tensor) -> Tensor:
    """Matrices [n, rows, columns], each scaled to the Frobenius norm of the one in `like`."""
    return matrix * (_norm(like) / _norm(matrix).clamp_min(TINY))


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norms [n, 1, 1]."""
    return torch.linalg.matrix_norm(matrix, keepdim=True)


BEFORE: dict[str, Slot] = {
    "none": Slot(), "sign": Sign(), "row": UnitRows(), "column": UnitRows(dim=1), "elementwise": ElementwiseMoment(),
    "kronecker": Kronecker(), "eigenbasis": Eigenbasis(),
}  # fmt: skip
AFTER: dict[str, Slot] = {
    "none": Slot(), "row": RowMoment(), "elementwise": ElementwiseAfter(), "renorm": Renorm(), "scalar": ScalarMoment(),
    "accumulated": AccumulatedNorm(),
}  # fmt: skip


def choices(name: str, value: Any, known: Any) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}={value}: must be one of {', '.join(known)}; correct it")
