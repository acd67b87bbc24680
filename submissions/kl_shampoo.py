"""KL-Shampoo and KL-SOAP: Lin et al. 2025, "Understanding and Improving Shampoo and SOAP via Kullback-Leibler
Minimization", arXiv:2509.03378. The covariance of a gradient G [m, n] as a Kronecker product, each factor learned with
the other one's inverse in place of the identity that Shampoo has there:

    L ← β2 L + (1 - β2) G R⁻¹ Gᵀ / n,   R ← β2 R + (1 - β2) Gᵀ L⁻¹ G / m

in their eigenbases L = Q_L diag(l) Q_Lᵀ, R = Q_R diag(r) Q_Rᵀ, with estimates of the eigenvalues from each gradient and
one step of power iteration on the bases every f steps. With G' = Q_Lᵀ G Q_R, M ← β1 M + (1 - β1) G, M' = Q_Lᵀ M Q_R:

    l ← β2 l + (1 - β2) mean over columns of G'² / r,   r ← β2 r + (1 - β2) mean over rows of G'² / l
    KL-Shampoo     W ← W - η (Q_L [M' / √(l rᵀ)] Q_Rᵀ + λ W)
    KL-SOAP        W ← W - η (Q_L [M' / (√V + ε)] Q_Rᵀ + λ W),   V ← β3 V + (1 - β3) G'²

The first gradient only makes the bases. 1/√l and 1/√r are at most 4000. Neither has a bias correction, nor do they
borrow the length of Adam's step. AdamW trains all parameters but hidden matrices and convolutions, with the same η and
λ. State per matrix: KL-SOAP 2mn + 2m² + 2n² + m + n numbers, KL-Shampoo mn less. Defaults: modded-nanogpt track 3,
result 19 (β1 = 0.95, β2 = β3 = 0.9, f = 1, l and r 0.1 at first); η is AdamW's usual.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.matrices import MatrixRule, MatrixSubmission, eigendecomposition, stack_state, zero_square
from submissions.rule import Bucket
from submissions.soap import rotate

LARGEST_INVERSE_ROOT = 4000.0


class KLShampoo(MatrixSubmission):
    """KL-Shampoo for hidden matrices and convolutions, with AdamW for the rest.

    betas: (β1, β2). precondition_frequency: f. initial_eigenvalue: l and r at first.
    """

    host_waits = "at its first step, for an eigendecomposition"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.9),
        weight_decay: float = 0.01,
        precondition_frequency: PositiveInt = 1,
        initial_eigenvalue: PositiveFloat = 0.1,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        rule: dict[str, Any] = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "precondition_frequency": precondition_frequency,
            "initial_eigenvalue": initial_eigenvalue,
        }  # fmt: skip
        adamw = {"lr": lr, "betas": adamw_betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, lambda groups: KLShampooRule(groups, rule), adamw)


class KLSOAP(MatrixSubmission):
    """KL-SOAP for hidden matrices and convolutions, with AdamW for the rest.

    betas: (β1, β2, β3). precondition_frequency: f. initial_eigenvalue: l and r at first.
    """

    host_waits = "at its first step, for an eigendecomposition"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 3e-3,
        betas: tuple[float, float, float] = (0.95, 0.9, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: PositiveInt = 1,
        initial_eigenvalue: PositiveFloat = 0.1,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        rule: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency, "initial_eigenvalue": initial_eigenvalue,
        }  # fmt: skip
        adamw = {"lr": lr, "betas": adamw_betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, lambda groups: KLSOAPRule(groups, rule), adamw)


class KLShampooRule(MatrixRule):
    """KL-Shampoo as in the module docstring. State: L, R as `covariance_0` and `_1`, Q_L, Q_R as `basis_0` and `_1`, l
    and r as `eigenvalues_0` and `_1`, M' as `momentum`."""

    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        squares = {f"{name}_{side}": zero_square(theta, side) for name in ("covariance", "basis") for side in (0, 1)}
        values = {
            f"eigenvalues_{side}": theta.new_full((theta.shape[side],), group["initial_eigenvalue"]) for side in (0, 1)
        }
        return super().initial_state(theta, g, group) | squares | values

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        beta1, beta2 = bucket["betas"][:2]
        bases = {side: stack_state(bucket, f"basis_{side}") for side in (0, 1)}
        covariances = {side: stack_state(bucket, f"covariance_{side}") for side in (0, 1)}
        if bucket.t == 1:
            for side, covariance in covariances.items():
                product = gradient @ gradient.mT if side == 0 else gradient.mT @ gradient
                covariance.copy_(product / gradient.shape[2 - side])
                bases[side].copy_(eigendecomposition(covariance)[1])
            return torch.zeros_like(gradient)
        momentum = stack_state(bucket, "momentum")
        rotated = rotate(gradient, bases)
        momentum.lerp_(rotated, 1 - beta1)
        # With the factors that the gradient has not yet entered.
        inverse_roots = self._inverse_roots(bucket)
        direction = rotate(self.scale(bucket, momentum, rotated, inverse_roots), bases, inverse=True)
        self._learn_factors(bucket, gradient, rotated, inverse_roots, beta2)
        if (bucket.t - 1) % bucket["precondition_frequency"] == 0:
            kept = rotate(momentum, bases, inverse=True)
            for side, basis in bases.items():
                basis.copy_(torch.linalg.qr(covariances[side] @ basis).Q)
            momentum.copy_(rotate(kept, bases))
        return direction

    def scale(self, bucket: Bucket, momentum: Tensor, rotated: Tensor, inverse_roots: list[Tensor]) -> Tensor:
        """The direction in the eigenbases. momentum: M'. rotated: G'. inverse_roots: 1/√l and 1/√r."""
        return momentum * inverse_roots[0].unsqueeze(2) * inverse_roots[1].unsqueeze(1)

    def _inverse_roots(self, bucket: Bucket) -> list[Tensor]:
        values = [stack_state(bucket, f"eigenvalues_{side}") for side in (0, 1)]
        return [value.clamp_min(1e-30).rsqrt().clamp_max(LARGEST_INVERSE_ROOT) for value in values]

    def _learn_factors(
        self, bucket: Bucket, gradient: Tensor, rotated: Tensor, inverse_roots: list[Tensor], beta2: float
    ) -> None:
        """L and R, l and r after a gradient, each with the other side's factor from before it."""
        rows, columns = gradient.shape[1:]
        left, right = inverse_roots[0].unsqueeze(2), inverse_roots[1].unsqueeze(1)
        # G Q_R / √r and Q_Lᵀ G / √l.
        whitened_columns = gradient @ stack_state(bucket, "basis_1") * right
        whitened_rows = stack_state(bucket, "basis_0").mT @ gradient * left
        targets = (whitened_columns @ whitened_columns.mT / columns, whitened_rows.mT @ whitened_rows / rows)
        means = ((rotated * right).square().mean(2), (rotated * left).square().mean(1))
        for side in (0, 1):
            stack_state(bucket, f"covariance_{side}").lerp_(targets[side], 1 - beta2)
            stack_state(bucket, f"eigenvalues_{side}").lerp_(means[side], 1 - beta2)


class KLSOAPRule(KLShampooRule):
    """KL-SOAP as in the module docstring. State: KL-Shampoo's, and V as `second_moment`."""

    buffers = ("momentum", "second_moment")

    @override
    def scale(self, bucket: Bucket, momentum: Tensor, rotated: Tensor, inverse_roots: list[Tensor]) -> Tensor:
        v, beta3 = stack_state(bucket, "second_moment"), bucket["betas"][2]
        v.mul_(beta3).addcmul_(rotated, rotated, value=1 - beta3)
        return momentum / (v.sqrt() + bucket["eps"])
