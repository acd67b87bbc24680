"""Lion (EvoLved Sign Momentum): Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms",
arXiv:2302.06675, Algorithm 2. With gradient g, momentum m, learning rate η and weight decay λ:

    c = β1 m + (1 - β1) g
    θ ← θ - η (sign(c) + λ θ)
    m ← β2 m + (1 - β2) g

One state tensor per parameter. Defaults (section 5): β = (0.9, 0.99); a learning rate 3 to 10 times smaller and a
weight decay as many times larger than AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Lion(torch.optim.Optimizer):
    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["betas"], group["weight_decay"])
        return loss

    def _update(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        beta1, beta2 = betas
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        direction = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(direction)
        if weight_decay:
            torch._foreach_add_(direction, parameters, alpha=weight_decay)
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
