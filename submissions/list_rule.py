"""What update rules share that work on whole lists of parameters: which parameters, in which precision, which state.

A rule writes `update` with `torch._foreach_*` and asks for its state by name. The arithmetic and the state of 16-bit
parameters are in float32, and stay so when a state is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Tensors = list[Tensor] | tuple[Tensor, ...]


class ListRule(torch.optim.Optimizer, ABC):
    """One update per parameter group; `group["step"]` counts from 1 within it. Empty tensors are left out."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.update_groups([(group, parameters) for group in self.param_groups if (parameters := _trainable(group))])
        return loss

    def update_groups(self, groups: list[tuple[Group, list[Tensor]]]) -> None:
        for group, parameters in groups:
            group["step"] = group.get("step", 0) + 1
            self.update(parameters, gradients_of(parameters), group)

    @abstractmethod
    def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
        """Change the parameters in place; the gradients are not to be changed."""

    def tensors(
        self, parameters: list[Tensor], key: str, make: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """The state `key` of each parameter, at first `make(parameter)`, by default zeros like it."""
        for parameter in parameters:
            if key not in self.state[parameter]:
                self.state[parameter][key] = (make or zeros)(parameter)
        return [self.state[parameter][key] for parameter in parameters]

    def shared(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of the whole rule, to be changed in place, at first `make()`."""
        own: dict[str, Tensor] = self.state["global"]  # type: ignore[index]
        if key not in own:
            own[key] = make()
        return own[key]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does it, except that every tensor keeps its own dtype instead of getting its parameter's."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device)


class GlobalRule(ListRule):
    """A rule with quantities over all parameters, whatever their group: groups differ in their weight decay only."""

    def update_groups(self, groups: list[tuple[Group, list[Tensor]]]) -> None:
        parameters = [parameter for _, members in groups for parameter in members]
        if not parameters:
            return
        first = self.param_groups[0]
        first["step"] = first.get("step", 0) + 1
        decays = [group["weight_decay"] for group, members in groups for _ in members]
        self.update(parameters, gradients_of(parameters), first | {"weight_decay": decays})


def zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=working_dtype(parameter))


def working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def working(tensors: list[Tensor]) -> list[Tensor]:
    """In their working dtype; the tensors themselves where they have it."""
    return [tensor.to(working_dtype(tensor)) for tensor in tensors]


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    return working([p.grad for p in parameters if p.grad is not None])


def inner_product(a: Tensors, b: Tensors) -> Tensor:
    """Sum over all elements of all tensors."""
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


def update_moments(
    m: Tensors,
    v: Tensors,
    gradients: Tensors,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> list[Tensor]:
    """One step of Adam's moments (Kingma & Ba 2015), in place; returns the direction m̂ / (√v̂ + ε)."""
    beta1, beta2 = betas
    torch._foreach_lerp_(m, gradients, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominator, eps)
    torch._foreach_mul_(denominator, 1 - beta1**step)
    return list(torch._foreach_div(m, denominator))


def decay_weights(parameters: list[Tensor], lr: float, weight_decay: float) -> None:
    """Decoupled weight decay (Loshchilov & Hutter 2019): θ ← (1 - ηλ) θ."""
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)


def _trainable(group: Group) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None and p.numel()]
