"""M-FAC: Frantar, Kurtic & Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
arXiv:2107.03356, section 3.2 (the dynamic variant). Natural gradient with the empirical Fisher matrix of the last m
gradients g_i, each of all parameters as one vector of d numbers:

    g ← g + wd θ,   F = λ I + (1/m) Σ_i g_i g_iᵀ,   b ← μ b + (1 - μ) F⁻¹ g,   θ ← θ - η b

Momentum is an average and weight decay is part of the gradient, as in the authors' code.

F is never formed. With the gradients as the rows of G [m, d], Woodbury's identity gives

    F⁻¹ g = (g - Gᵀ (m λ I + G Gᵀ)⁻¹ G g) / λ

and G Gᵀ changes by one row and one column per step. This costs O(dm + m³) per step; the paper's recursion costs
O(dm + m²) and gives the same result. Until m gradients have been seen the others count as zeros. State: G, G Gᵀ, and b
where μ > 0. Defaults: the authors' code (η = 1e-3, m = 1024, λ = 1e-5, μ = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from submissions.rule import Bucket, Rule, Tensors, average_


class MFAC(Rule):
    """M-FAC: the update of the module docstring. gradients: m. damping: λ. momentum: μ. weight_decay: wd."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        gradients: PositiveInt = 1024,
        damping: PositiveFloat = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        hyperparameters = {"lr": lr, "gradients": gradients, "damping": damping, "momentum": momentum}
        super().__init__(params, hyperparameters | {"weight_decay": weight_decay, "updates": 0})

    @override
    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"window": theta.new_zeros(group["gradients"], theta.numel())}
        return state | ({"momentum": torch.zeros_like(theta)} if group["momentum"] else {})

    @override
    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        """Compute (m λ I + G Gᵀ)⁻¹ G g from products over all parameters, as `weights` for `direction`."""
        if not buckets:
            return
        shared = self.param_groups[0]
        m, row = shared["gradients"], shared["updates"] % shared["gradients"]
        for group in self.param_groups:
            group["updates"] += 1
        # The oldest gradient leaves the window. The row stays zero for parameters without a gradient in this step.
        for state in self.state.values():
            if "window" in state:
                state["window"][row] = 0
        products = []
        for bucket in buckets:
            # The decay enters the window with the gradient.
            bucket.scratch["decayed"] = torch._foreach_add(bucket.g, bucket.theta, alpha=bucket["weight_decay"])
            for g, window in zip(bucket.scratch["decayed"], bucket.state("window"), strict=True):
                window[row] = g.reshape(-1)
                # Summed in float64: the system is nearly singular, since λ is small.
                products.append((window @ g.reshape(-1)).double())
        product = torch.stack(products).sum(0)
        gram = self.shared("gram", lambda: product.new_zeros(m, m))
        gram[row] = gram[:, row] = product
        system = gram + m * shared["damping"] * torch.eye(m, dtype=gram.dtype, device=gram.device)
        # cholesky_ex raises no error for numbers that are not finite, so a diverging trial ends as such.
        weights = torch.cholesky_solve(product.unsqueeze(1), torch.linalg.cholesky_ex(system).L).squeeze(1)
        for bucket in buckets:
            bucket.scratch["weights"] = weights.to(bucket.g[0].dtype)

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        # Gᵀ (m λ I + G Gᵀ)⁻¹ G g.
        projections = [
            (bucket.scratch["weights"] @ window).view(g.shape)
            for window, g in zip(bucket.state("window"), bucket.scratch["decayed"], strict=True)
        ]
        direction = torch._foreach_sub(bucket.scratch["decayed"], projections)
        torch._foreach_div_(direction, bucket["damping"])
        if not bucket["momentum"]:
            return direction
        momentum = bucket.state("momentum")
        average_(momentum, direction, bucket["momentum"])
        return momentum

    @override
    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        # Weight decay is in the direction already.
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])
