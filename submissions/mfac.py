"""M-FAC: Frantar, Kurtic & Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
arXiv:2107.03356, section 3.2 (the dynamic variant). Natural gradient with the empirical Fisher matrix of the last m
gradients g_i, of the whole model as one vector of d numbers:

    F = λ I + (1/m) Σ_i g_i g_iᵀ,   b ← μ b + F⁻¹ g,   θ ← θ - η (b + wd θ)

F is never formed. With the gradients as the rows of G [m, d], by the identity of Woodbury,

    F⁻¹ g = (g - Gᵀ (m λ I + G Gᵀ)⁻¹ G g) / λ

and G Gᵀ changes by one row and one column per step: O(dm + m³) for what the paper's recursion does in O(dm + m²)
after setting up, with the same result. Gradients not seen yet count as zeros. State: G, G Gᵀ, and b where μ > 0.
Defaults: the authors' code (η = 1e-3, m = 1024, λ = 1e-5, μ = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from submissions.list_rule import GlobalRule, Group, working_dtype


class MFAC(GlobalRule):
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        gradients: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if gradients < 1:
            raise ValueError(f"gradients={gradients}: must be at least 1")
        if damping <= 0:
            raise ValueError(f"damping={damping}: must be above 0")
        super().__init__(
            params,
            {"lr": lr, "gradients": gradients, "damping": damping, "momentum": momentum, "weight_decay": weight_decay},
        )

    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        lr, m, damping = group["lr"], group["gradients"], group["damping"]
        # Every parameter has its place, also one without a gradient this time.
        everything = [p for g in self.param_groups for p in g["params"]]
        found = dict(zip(parameters, gradients, strict=True))
        dtype = working_dtype(parameters[0])
        g = torch.cat([found[p].reshape(-1) if p in found else p.new_zeros(p.numel(), dtype=dtype) for p in everything])
        rows = self.shared("gradients", lambda: g.new_zeros(m, len(g)))
        gram = self.shared("gram", lambda: torch.zeros(m, m, dtype=torch.float64, device=g.device))
        place = (group["step"] - 1) % m
        rows[place] = g
        products = rows @ g
        gram[place] = gram[:, place] = products.double()
        system = gram + m * damping * torch.eye(m, dtype=gram.dtype, device=gram.device)
        weights = torch.cholesky_solve(products.double().unsqueeze(1), torch.linalg.cholesky_ex(system).L).to(dtype)
        direction = (g - (weights.T @ rows).squeeze(0)) / damping
        if group["momentum"]:
            direction = self.shared("momentum", lambda: torch.zeros_like(g)).mul_(group["momentum"]).add_(direction)
        updates = dict(zip(everything, direction.split([p.numel() for p in everything]), strict=True))
        torch._foreach_mul_(parameters, [1 - lr * decay for decay in group["weight_decay"]])
        torch._foreach_add_(parameters, [updates[p].view(p.shape) for p in parameters], alpha=-lr)
