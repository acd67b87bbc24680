"""The common base of update rules, so that a file per algorithm holds only its equations.

A rule gives the direction u that the learning rate multiplies; the step then is, with decoupled weight decay
(Loshchilov & Hutter 2019, arXiv:1711.05101),

    θ ← θ - η (u + λ θ)

    class SignDescent(Rule):
        def __init__(self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        @override
        def direction(self, bucket: Bucket) -> Tensors:
            return torch._foreach_sign(bucket.g)

A rule works on whole lists of tensors, a `Bucket` at a time. Parameters without a gradient are skipped, and their step
counter is not incremented: each parameter counts its own steps, which bias corrections need. Parameters narrower than
32 bits are updated in float32, state included, and rounded once.

A CPU updates a block of parameters at a time, which stays in its cache. For a rule that says it is `elementwise`, large
parameters are cut into pieces and small ones put together (submissions/blocks.py); any other rule gets each as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness import renamed
from submissions.blocks import Packs, Row, cut

Tensors = list[Tensor] | tuple[Tensor, ...]
__getattr__ = renamed.names("submissions.rule")


@dataclass(frozen=True)
class Bucket:
    """Parameters of one group that are updated together: all have a gradient, the same dtype and the same step count.

    On a CPU a large group is several buckets. For an elementwise rule an entry there may be a piece of a large
    parameter, or several small parameters together, one-dimensional; likewise g and the state.
    """

    parameters: list[Tensor]
    """The parameters themselves, of several together the first; see `look_up`. Not to be written to."""
    theta: list[Tensor]
    """Their values, to be updated in place; copies in float32 where the parameters are narrower than 32 bits."""
    g: list[Tensor]
    """Their gradients, in the dtype of theta. Not to be written to."""
    t: int
    """Steps of these parameters, this one included: 1, 2, ..."""
    states: list[dict[str, Any]]
    """The state of each parameter."""
    group: dict[str, Any]
    """The parameter group, with its hyperparameters by name."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """What `prepare_step`, `direction`, `apply` and `finish_step` of the same step leave for each other."""
    rows: list[Row] = field(default_factory=list)
    """What the entries were made of."""
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Parameters of which theta holds copies, each with its part of them: to be written after the step."""

    def __getitem__(self, hyperparameter: str) -> Any:
        return self.group[hyperparameter]

    def state(self, name: str) -> list[Tensor]:
        """The state tensors `name` of all parameters, parallel to theta."""
        return [state[name] for state in self.states]

    def look_up(self, values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """What a submission hands to its rule by parameter: the values of this bucket, in the dtype of theta."""
        return [row.find(values).to(theta.dtype) for row, theta in zip(self.rows, self.theta, strict=True)]

    def subset(self, positions: Sequence[int]) -> Bucket:
        """A bucket of some of the parameters."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in positions]

        parameters, theta, g = pick(self.parameters), pick(self.theta), pick(self.g)
        return Bucket(parameters, theta, g, self.t, pick(self.states), self.group, rows=pick(self.rows))


class Rule(torch.optim.Optimizer):
    """An update rule over whole lists of parameters. A subclass defines `direction`, and what else differs."""

    ranges_by_name: ClassVar[bool] = True
    """Hyperparameters without an annotated range have the one of their name: an `lr` is positive."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of state tensors of the parameter's shape that start at zero."""
    elementwise: ClassVar[bool] = False
    """Whether `direction` and `apply` treat every element by itself, with the same numbers for all of a bucket.
    What differs between parameters is in their state. So no norms, sums or matrix products, and no new state tensors
    in place of the old ones. Not inherited by a class that overrides one of the two."""
    block: ClassVar[float] = 2**18
    """About how many elements a CPU updates together: so few that what one operation has written is still in its cache
    when the next one reads it."""
    small: ClassVar[int] = 2**14
    """Most elements of a parameter that an elementwise rule updates together with others on a CPU. Copying a larger one
    takes longer than the calls that it saves; with few operations, so does copying any."""

    host_waits: ClassVar[str] = ""
    """As `harness.interface.Submission.host_waits`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        renamed.refuse_overrides(cls, {"survey": "prepare_step"})
        # What a base says of its own equations does not hold for others.
        if {"direction", "apply"} & vars(cls).keys() and "elementwise" not in vars(cls):
            cls.elementwise = False

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]) -> None:
        super().__init__(params, hyperparameters)
        self._compiled: Callable[[Bucket], None] | None = None
        self._packs = Packs()

    def compile_update(self) -> None:
        """From now on an elementwise rule updates in one pass over memory, which its first step compiles
        (submissions/compilation.py). The results differ by rounding. Nothing changes for another rule."""
        from submissions.compilation import CompiledUpdate

        if self.elementwise:
            self._compiled = CompiledUpdate(self.update)

    def update(self, bucket: Bucket) -> None:
        """Move `bucket.theta`."""
        self.apply(bucket, self.direction(bucket))

    def direction(self, bucket: Bucket) -> Tensors:
        """What the learning rate multiplies, parallel to `bucket.theta`."""
        raise NotImplementedError

    def apply(self, bucket: Bucket, direction: Tensors) -> None:
        """Move `bucket.theta` along the direction, which may be a state tensor and is not to be written to."""
        if bucket["weight_decay"]:
            torch._foreach_mul_(bucket.theta, 1 - bucket["lr"] * bucket["weight_decay"])
        torch._foreach_add_(bucket.theta, direction, alpha=-bucket["lr"])

    def initial_state(self, theta: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter of `group` before its first step, whose gradient is `g`."""
        return {name: torch.zeros_like(theta) for name in self.buffers}

    def prepare_step(self, buckets: Sequence[Bucket]) -> None:
        """Called once per step before any parameter moves, for what depends on all of them, such as global norms."""

    def finish_step(self, buckets: Sequence[Bucket]) -> None:
        """Called once per step after all parameters have moved."""

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch.optim.Optimizer.step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
        self.prepare_step(buckets)
        # One bucket after the other, so that the direction of only one bucket is in memory.
        for bucket in buckets:
            (self._compiled or self.update)(bucket)
            if bucket.copies:
                parameters, values = zip(*bucket.copies, strict=True)
                torch._foreach_copy_(parameters, values)
        self.finish_step(buckets)
        return loss

    def shared(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """State of the whole rule, `make()` at first; to be changed in place."""
        shared_state: dict[str, Any] = self.state["shared"]  # type: ignore[index]
        if name not in shared_state:
            shared_state[name] = make()
        tensor: Tensor = shared_state[name]
        return tensor

    def _buckets(self, group: dict[str, Any]) -> list[Bucket]:
        """The group's parameters with gradients, by what must be alike within a bucket."""
        alike: dict[tuple[torch.dtype, torch.device, int, int], list[Row]] = {}
        together: dict[tuple[torch.dtype, int, int], tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]] = {}
        packing = self.elementwise and self._compiled is None
        elements = small_elements = 0
        for parameter in group["params"]:
            g = parameter.grad
            if g is None:
                continue
            if g.is_sparse:
                raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; give the embedding sparse=False")
            state = self._advance_state(parameter, g, group)
            if packing and self._packs.takes(parameter, self.small):
                small_elements += parameter.numel()
                block = int(small_elements // self.block)
                small = together.setdefault((parameter.dtype, state["step"], block), ([], [], []))
                small[0].append(parameter)
                small[1].append(g)
                small[2].append(state)
                continue
            # A GPU is faster with all at once, and a compiled update leaves nothing in a cache that is read again.
            in_blocks = self._compiled is None and parameter.is_cpu
            whole = Row([parameter], parameter, g, state)
            is_cut = in_blocks and self.elementwise and parameter.numel() > self.block
            for row in cut(whole, self.block) if is_cut else (whole,):
                elements += row.value.numel()
                block = int(elements // self.block) if in_blocks else 0
                alike.setdefault((parameter.dtype, parameter.device, state["step"], block), []).append(row)
        for (dtype, step, block), small in together.items():
            alike[dtype, small[0][0].device, step, -1 - block] = self._packs.pack(*small)
        buckets = []
        for (dtype, _, step, _), rows in alike.items():
            theta, g = [row.value for row in rows], [row.g for row in rows]
            narrow = dtype.itemsize < 4
            if narrow:
                theta, g = [upcast(value) for value in theta], [upcast(gradient) for gradient in g]
            copies = [
                pair
                for row, value in zip(rows, theta, strict=True)
                if narrow or row.stored
                for pair in row.copies(value)
            ]
            parameters, states = [row.parameters[0] for row in rows], [row.state for row in rows]
            buckets.append(Bucket(parameters, theta, g, step, states, group, rows=rows, copies=copies))
        return buckets

    def _advance_state(self, parameter: Tensor, g: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made at its first step, with its step counted."""
        state = self.state[parameter]
        if not state:
            state |= {"step": 0} | self.initial_state(upcast(parameter), upcast(g), group)
        state["step"] += 1
        return state


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is narrower; otherwise the tensor itself."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def inner_product(a: Tensors, b: Tensors) -> Tensor:
    """The sum of a · b over all elements of all tensors, a scalar; lists of equal shapes."""
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


# ---- steps that many rules share, over lists of tensors --------------------------------------------------------------


def average_(average: Tensors, values: Tensors, beta: float) -> None:
    """a ← β a + (1 - β) x, in place."""
    torch._foreach_lerp_(average, values, 1 - beta)


def average_square_(average: Tensors, values: Tensors, beta: float) -> None:
    """a ← β a + (1 - β) x², in place."""
    torch._foreach_mul_(average, beta)
    torch._foreach_addcmul_(average, values, values, value=1 - beta)


def add_scaled_(tensors: Tensors, others: Tensors, factor: float | Tensor) -> None:
    """a ← a + factor b, in place. A factor that is a scalar tensor stays on its device."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


def root(second_moment: Tensors, correction: float, eps: float | Tensor, scale: float = 1.0) -> Tensors:
    """scale (√(v / correction) + ε): Adam's denominator, where the correction is 1 - β2^t; new tensors."""
    denominator = torch._foreach_sqrt(second_moment)
    factor = scale / correction**0.5
    # A factor of 1 changes nothing but takes a pass over memory.
    if factor != 1:
        torch._foreach_mul_(denominator, factor)
    if isinstance(eps, Tensor):
        # By its name, or torch takes the scalar for a number, and waits for it.
        torch._foreach_add_(denominator, other=scale * eps)
    else:
        torch._foreach_add_(denominator, scale * eps)
    return denominator


def adam(bucket: Bucket) -> Tensors:
    """Adam's direction with the buffers `momentum` and `second_moment`."""
    return adam_direction(
        bucket.state("momentum"), bucket.state("second_moment"), bucket.g, bucket["betas"], bucket["eps"], bucket.t
    )


def adam_direction(
    momentum: Tensors, second_moment: Tensors, g: Tensors, betas: tuple[float, float], eps: float, t: int
) -> Tensors:
    """m̂ / (√v̂ + ε), after both moments have been updated with g; new tensors."""
    beta1, beta2 = betas
    average_(momentum, g, beta1)
    average_square_(second_moment, g, beta2)
    return torch._foreach_div(momentum, root(second_moment, 1 - beta2**t, eps, scale=1 - beta1**t))
