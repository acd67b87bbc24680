"""What update rules have in common, so that a file per algorithm holds only its equations.

A rule gives the direction u that the learning rate multiplies; the step then is, with decoupled weight decay
(Loshchilov & Hutter 2019, arXiv:1711.05101),

    θ ← θ - η (u + λ θ)

    class SignDescent(Rule):
        def __init__(self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        def direction(self, at: Slice) -> Tensors:
            return torch._foreach_sign(at.g)

Parameters without a gradient are skipped and do not age: each counts its own steps, which bias corrections need.
Parameters narrower than 32 bits are updated in float32, state included, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Slice:
    """Parameters of one group that are updated together: all have a gradient, one dtype and one age.

    On a CPU large groups are several slices."""

    parameters: list[Tensor]
    """Themselves, as keys of what a submission hands to its rule. Not to be written to."""
    theta: list[Tensor]
    """Values, to be updated in place; shares no memory with the parameters where these are narrower than 32 bits."""
    g: list[Tensor]
    """Gradients. Not to be written to."""
    t: int
    """Steps of these parameters, this one included: 1, 2, ..."""
    states: list[dict[str, Any]]
    group: dict[str, Any]
    """The parameter group, with its hyperparameters by name."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What `survey` leaves for `direction` and `apply` of the same step."""

    def __getitem__(self, hyperparameter: str) -> Any:
        return self.group[hyperparameter]

    def state(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]

    def part(self, places: Sequence[int]) -> Slice:
        """Some of the parameters."""

        def some(values: list[Any]) -> list[Any]:
            return [values[place] for place in places]

        return Slice(some(self.parameters), some(self.theta), some(self.g), self.t, some(self.states), self.group)


class Rule(torch.optim.Optimizer):
    """An update rule over whole lists of parameters. A subclass defines `direction`, and the rest where it differs."""

    buffers: ClassVar[tuple[str, ...]] = ()
    """State of the parameter's shape that starts at zero."""
    block: ClassVar[float] = 2**18
    """About how many elements a CPU updates together: so few that what one operation has written is still in its cache
    when the next one reads it."""

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, hyperparameters)

    def direction(self, at: Slice) -> Tensors:
        """What the learning rate multiplies, parallel to `at.theta`."""
        raise NotImplementedError

    def apply(self, at: Slice, direction: Tensors) -> None:
        """Move `at.theta` along the direction, which may be a buffer and is not to be written to."""
        if at["weight_decay"]:
            torch._foreach_mul_(at.theta, 1 - at["lr"] * at["weight_decay"])
        torch._foreach_add_(at.theta, direction, alpha=-at["lr"])

    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """State of a parameter of `group` before its first step, whose gradient is `g`."""
        return {name: torch.zeros_like(theta) for name in self.buffers}

    def survey(self, slices: Sequence[Slice]) -> None:
        """Called once per step before any parameter moves, for what depends on all of them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        slices = [at for group in self.param_groups for at in self._slices(group)]
        self.survey(slices)
        for at in slices:
            self.apply(at, self.direction(at))
            if at.theta[0] is not at.parameters[0]:
                torch._foreach_copy_(at.parameters, at.theta)
        return loss

    def shared(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """State of the whole rule, at first `make()`; to be changed in place."""
        own: dict[str, Any] = self.state["shared"]  # type: ignore[index]
        if name not in own:
            own[name] = make()
        tensor: Tensor = own[name]
        return tensor

    def _slices(self, group: dict[str, Any]) -> list[Slice]:
        alike: dict[tuple[torch.dtype, torch.device, int, int], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        elements = 0
        for parameter in group["params"]:
            g = parameter.grad
            if g is None:
                continue
            if g.is_sparse:
                raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; give the embedding sparse=False")
            state = self.state[parameter]
            if not state:
                state |= {"step": 0} | self.initial_state(wide(parameter), wide(g), group)
            state["step"] += 1
            elements += parameter.numel()
            block = int(elements // self.block) if parameter.device.type == "cpu" else 0
            key = parameter.dtype, parameter.device, state["step"], block
            alike.setdefault(key, []).append((parameter, g, state))
        slices = []
        for (dtype, _, age, _), rows in alike.items():
            parameters, g, states = (list(column) for column in zip(*rows, strict=True))
            narrow = dtype.itemsize < 4
            theta = [wide(parameter) for parameter in parameters] if narrow else parameters
            slices.append(Slice(parameters, theta, [wide(x) for x in g] if narrow else g, age, states, group))
        return slices


def wide(tensor: Tensor) -> Tensor:
    """At least float32; the tensor itself where it is."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def inner_product(a: Tensors, b: Tensors) -> Tensor:
    """Sum over all elements of all tensors."""
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


# Steps that many rules share, over lists of tensors.


def average_(average: Tensors, values: Tensors, beta: float) -> None:
    """a ← β a + (1 - β) x."""
    torch._foreach_lerp_(average, values, 1 - beta)


def average_square_(average: Tensors, values: Tensors, beta: float) -> None:
    """a ← β a + (1 - β) x²."""
    torch._foreach_mul_(average, beta)
    torch._foreach_addcmul_(average, values, values, value=1 - beta)


def root(second_moment: Tensors, correction: float, eps: float, scale: float = 1.0) -> Tensors:
    """scale (√(v / correction) + ε): Adam's denominator, where the correction is 1 - β2^t; new tensors."""
    denominator = torch._foreach_sqrt(second_moment)
    torch._foreach_mul_(denominator, scale / correction**0.5)
    torch._foreach_add_(denominator, scale * eps)
    return denominator


def adam(at: Slice) -> Tensors:
    """Adam's direction with the buffers `momentum` and `second_moment`."""
    return adam_direction(at.state("momentum"), at.state("second_moment"), at.g, at["betas"], at["eps"], at.t)


def adam_direction(
    momentum: Tensors, second_moment: Tensors, g: Tensors, betas: tuple[float, float], eps: float, t: int
) -> Tensors:
    """m̂ / (√v̂ + ε), after both moments have been updated with g; new tensors."""
    beta1, beta2 = betas
    average_(momentum, g, beta1)
    average_square_(second_moment, g, beta2)
    return torch._foreach_div(momentum, root(second_moment, 1 - beta2**t, eps, scale=1 - beta1**t))
