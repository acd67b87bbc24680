"""Conda: Wang et al. 2025, "Conda: Column-Normalized Adam for Training Large Language Models Faster", arXiv:2509.24218.
Adam with its second moment in a basis of singular vectors of the momentum. For a gradient G [m, n], m ≥ n (transposed
otherwise):

    M ← β1 M + (1 - β1) G
    every T steps: Q ← the right singular vectors of M
    v ← β2 v + (1 - β2) (G Q)²
    W ← W - η (α M̂ Q / (√v̂ + ε) Qᵀ + λ W)

AdamW trains embeddings, head, norms and biases with the same hyperparameters. State per matrix: 2mn + n² numbers.
Defaults: T = 2000, α = 0.25 as GaLore's, whose settings the paper takes over; Adam's are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup
from submissions.low_rank import expand
from submissions.matrices import MatrixRule, MatrixSubmission, leading_right_singular_vectors, stack_state, to_tall
from submissions.rule import Bucket


class Conda(MatrixSubmission):
    """Conda for hidden matrices and convolutions. refresh_every: T. scale: α."""

    host_waits = "every T steps, for singular vectors"

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh_every: PositiveInt = 2000,
        scale: PositiveFloat = 0.25,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        conda = {"refresh_every": refresh_every, "scale": scale}
        super().__init__(setup, lambda groups: CondaRule(groups, adam | conda), adam)


class CondaRule(MatrixRule):
    """The update of the module docstring. State per matrix: M, v [m, n] and Q as `basis`."""

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        tall = to_tall(theta)[0]
        state = {name: torch.zeros_like(tall) for name in ("momentum", "second_moment")}
        return state | {"basis": theta.new_zeros(tall.shape[1], tall.shape[1])}

    @override
    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        (beta1, beta2), t = bucket["betas"], bucket.t
        g, transposed = to_tall(gradient)
        m, v, basis = (stack_state(bucket, name) for name in ("momentum", "second_moment", "basis"))
        m.lerp_(g, 1 - beta1)
        if (t - 1) % bucket["refresh_every"] == 0:
            basis.copy_(leading_right_singular_vectors(m, basis.shape[2]))
        projected = g @ basis
        v.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        direction = (m @ basis) / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + bucket["eps"])
        return expand(bucket["scale"] * direction, basis, transposed)
