"""A `torch.optim.Optimizer` of any library as a submission: how its class is built, called, scheduled and saved.

What the class takes is read from the names in the signatures of its constructor and of `step`. What these do not tell
is an option: parameter groups with keys of their own, a fallback optimizer for parameters that the class refuses, a
base optimizer that it goes around.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from harness.interface.needs import Need
from harness.interface.optimizer_signature import (
    Takes,
    filled_arguments,
    requires_closure,
    takes_loss,
)
from harness.interface.optimizer_state import load_optimizer, note_groups, optimizer_tensors, save_optimizer
from harness.interface.roles import Role
from harness.interface.step import StepContext
from harness.interface.submission import (
    OptimizerSubmission,
    Setup,
    switches_weights,
)

REST = "rest"
"""The key of `param_groups` for the parameters that no other key claims."""

# ---- which parameters ----------------------------------------------------------------------------------------------


def claim_parameters(
    keys: Sequence[str], roles: Mapping[str, Role], option: str = "optimizer.param_groups"
) -> dict[str, list[str]]:
    """The names of the parameters that each key claims, in the model's order.

    keys: roles, patterns of names (fnmatch), and `rest`. Raises ValueError for a key that claims nothing, a parameter
    that two keys claim, and one that none does. option: what the keys were given as, for the messages.
    """
    claims: dict[str, list[str]] = {key: [] for key in keys}
    for name, role in roles.items():
        matching = [key for key in keys if key != REST and (key == role or fnmatchcase(name, key))]
        if len(matching) > 1:
            raise ValueError(
                f"{option}: {' and '.join(matching)} both claim `{name}`; let each parameter be claimed once, and use "
                f"`{REST}` for all others"
            )
        if not matching and REST not in claims:
            raise ValueError(f"{option}: nothing claims `{name}` ({role}); add the key `{REST}`")
        claims[matching[0] if matching else REST].append(name)
    for key, names in claims.items():
        if not names and key != REST:
            present = ", ".join(dict.fromkeys(roles.values()))
            raise ValueError(f"{option}.{key}: no parameter matches; the model has the roles {present}")
    return claims


@dataclass(frozen=True)
class Part:
    """A class of optimizers with its arguments."""

    cls: type[torch.optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Assembly:
    """Which optimizers a submission is made of, and what each gets."""

    main: Part
    takes: Takes | None = None
    """What the class is built on, where the name of its argument does not tell it."""
    param_groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further keys of parameter groups, by role, pattern, or `rest`."""
    base: Part | None = None
    """The optimizer that the class goes around."""
    fallback: Part | None = None
    """The optimizer of the parameters in `fallback_parameters`."""
    fallback_parameters: tuple[str, ...] = ()
    """Roles and patterns; empty for all but hidden matrices."""
    closure: bool = False
    """Call `step` with a closure, which is done anyway where `step` requires one."""
    gradient_first: bool = False
    """Compute a gradient before a `step` with a closure, as SAM of most libraries expects it."""

    def build(self, setup: Setup) -> list[torch.optim.Optimizer]:
        """The optimizers on the trainable parameters. Raises ValueError for keys that do not fit the model, and
        whatever the classes raise."""
        roles = {name: setup._roles[name] for name in setup.named_parameters}
        names = self._main_names(roles)
        optimizers = [self._build_main(setup, {name: roles[name] for name in names})] if names else []
        if self.fallback is not None:
            others = [name for name in roles if name not in names]
            optimizers.append(_construct(self.fallback, _groups(setup, self.fallback.cls, others), setup))
        if not names:
            raise ValueError(
                f"optimizer.fallback takes all parameters and leaves none to {self.main.cls.__name__}; "
                "set optimizer.fallback.parameters, a list of roles and patterns"
            )
        return optimizers

    def _main_names(self, roles: dict[str, Role]) -> list[str]:
        """The names of the parameters that the fallback does not get, in the model's order: a checkpoint has the
        parameters by their numbers, and sums over them depend on it."""
        if self.fallback is None:
            return list(roles)
        if not self.fallback_parameters:
            return [name for name, role in roles.items() if role is Role.HIDDEN_MATRIX]
        keys = [*self.fallback_parameters, REST]
        return claim_parameters(keys, roles, "optimizer.fallback.parameters")[REST]

    def _build_main(self, setup: Setup, roles: dict[str, Role]) -> torch.optim.Optimizer:
        decaying = self.base.cls if self.base is not None else self.main.cls
        if not self.param_groups:
            groups = _groups(setup, decaying, list(roles))
        else:
            groups = []
            for key, names in claim_parameters(list(self.param_groups), roles).items():
                entries = _copy(self.param_groups[key])
                # What a key says of weight decay takes the place of what the roles say.
                groups += [{**group, **entries} for group in _groups(setup, decaying, names) if names]
        return _construct(self.main, groups, setup, self.takes, self.base)


def _copy(entries: Mapping[str, Any]) -> dict[str, Any]:
    # YAML has lists where torch wants tuples.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}


def _groups(setup: Setup, cls: type[Any], names: list[str]) -> list[dict[str, Any]]:
    """Parameter groups of `names`, without weight decay for the roles in `no_decay` if the class knows weight decay."""
    if "weight_decay" in inspect.signature(cls.__init__).parameters:
        return setup.decay_groups(names)
    return [{"params": [setup.named_parameters[name] for name in names]}]


def _construct(
    part: Part,
    groups: list[dict[str, Any]],
    setup: Setup,
    takes: Takes | None = None,
    base: Part | None = None,
) -> torch.optim.Optimizer:
    """An optimizer on the groups, with the arguments that are no hyperparameters filled in."""
    filled = filled_arguments(part.cls)
    arguments = dict(part.arguments)
    signature = inspect.signature(part.cls.__init__).parameters.values()
    builds_base = "parameters" in filled.values() and any(p.kind is p.VAR_KEYWORD for p in signature)
    positional = []
    for number, (name, slot) in enumerate(filled.items()):
        # What `takes` says is about the first argument.
        content = (takes or slot) if number == 0 else slot
        value: Any
        if content == "base":
            if base is None:
                continue
            if builds_base:
                arguments |= base.arguments
                value = base.cls
            else:
                value = _construct(base, _fresh(groups), setup)
        elif content == "model":
            value = setup.model
        elif content == "named_parameters":
            value = _named(groups, setup)
        else:
            value = _plain(groups)
        if number == 0:
            positional.append(value)
        else:
            arguments[name] = value
    return part.cls(*positional, **arguments)


def _fresh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(group) for group in groups]


def _plain(groups: list[dict[str, Any]]) -> Any:
    """The parameters alone where the groups say nothing else: some classes know no groups."""
    return list(groups[0]["params"]) if len(groups) == 1 and len(groups[0]) == 1 else _fresh(groups)


def _named(groups: list[dict[str, Any]], setup: Setup) -> Any:
    names = {parameter: name for name, parameter in setup.named_parameters.items()}
    return _plain([{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups])


# ---- the submission ------------------------------------------------------------------------------------------------

_BOUNDS = ("initial", "base", "final", "min", "max", "largest", "scheduled", "precondition", "precond", "warmup")


def is_rate(key: str) -> bool:
    """Whether an entry of a parameter group is a learning rate, which follows the schedule: `lr`, `adamw_lr`. Bounds of
    one, such as `max_lr`, are none."""
    return key == "lr" or (key.endswith("_lr") and key.removesuffix("_lr").rpartition("_")[2] not in _BOUNDS)


class AnyOptimizer(OptimizerSubmission):
    """Optimizers of any library, as an `Assembly` says.

    Every entry of their parameter groups that is a learning rate follows the schedule. With
    Need.SECOND_DERIVATIVES the gradients have a graph (create_graph).
    """

    def __init__(self, setup: Setup, assembly: Assembly) -> None:
        """Raises as `Assembly.build` and `OptimizerSubmission` do."""
        super().__init__(setup, assembly.build(setup))
        main = self.optimizers[0]
        self._assembly = assembly
        self._with_closure = [
            requires_closure(type(optimizer)) or (assembly.closure and optimizer is main)
            for optimizer in self.optimizers
        ]
        self._all_optimizers = [*self.optimizers, *_inner_optimizers(self.optimizers)]
        self._rates = [
            [{key: group[key] for key in group if is_rate(key) and _is_number(group[key])} for group in o.param_groups]
            for o in self._all_optimizers
        ]
        self._groups_parts = [[setup.schedule_part(group) for group in o.param_groups] for o in self._all_optimizers]
        self._decays = [[group.get("weight_decay") for group in o.param_groups] for o in self._all_optimizers]
        self._made_with = [note_groups(optimizer) for optimizer in self._all_optimizers]

    @property
    def unscheduled_rates(self) -> list[str]:
        """Hyperparameters that are called rates and do not follow the schedule: those that no parameter group has, and
        bounds of rates."""
        rates = [rates for of_optimizer in self._rates for rates in of_optimizer]
        scheduled = {key for of_group in rates for key in of_group}
        values = [value for of_group in rates for value in of_group.values()]
        main = self._assembly.main
        names = [name for name in inspect.signature(main.cls.__init__).parameters if name.endswith("_lr")]
        given = {name: main.arguments.get(name, self.optimizers[0].defaults.get(name)) for name in names}
        for name, parameter in inspect.signature(main.cls.__init__).parameters.items():
            if name in given and given[name] is None:
                given[name] = parameter.default
        # A group of its own may have it as its `lr`.
        return [n for n, v in given.items() if _is_number(v) and n not in scheduled and v not in values]

    @override
    def step(self, ctx: StepContext) -> None:
        self.apply_schedule(ctx)
        loss = None
        # After a closure the gradient is that of its last call.
        if not self._with_closure[0] or self._assembly.gradient_first:
            loss = self._gradient(ctx)
        for optimizer, with_closure in zip(self.optimizers, self._with_closure, strict=True):
            if with_closure:
                optimizer.step(self.make_closure(ctx))
            elif loss is not None and takes_loss(type(optimizer)):
                optimizer.step(loss=loss.clone())  # type: ignore[call-overload]
            else:
                optimizer.step()
        if Need.SECOND_DERIVATIVES in self.setup.needs:
            # A gradient and its graph hold each other.
            for parameter in self.setup.parameters:
                parameter.grad = None

    @override
    def apply_schedule(self, ctx: StepContext) -> None:
        factors = self.setup.learning_rate_factors(ctx.step)
        for optimizer, rates, decays, parts in zip(
            self._all_optimizers, self._rates, self._decays, self._groups_parts, strict=True
        ):
            for group, initial, decay, part in zip(optimizer.param_groups, rates, decays, parts, strict=True):
                for key, rate in initial.items():
                    group[key] = rate * factors[part]
                if decay is not None and _is_number(decay) and self.setup.schedule.scale_weight_decay:
                    group["weight_decay"] = decay * factors[part]

    @override
    def _gradient(self, ctx: StepContext) -> Tensor:
        if Need.SECOND_DERIVATIVES not in self.setup.needs:
            return super()._gradient(ctx)
        loss, gradients = ctx.loss_and_gradients(create_graph=True)
        for parameter, gradient in zip(self.setup.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.clip_gradients()
        return loss

    @override
    def _switching_optimizers(self) -> list[Any]:
        return self._switching

    @cached_property
    def _switching(self) -> list[Any]:
        outer = [optimizer for optimizer in self.optimizers if switches_weights(type(optimizer))]
        # An optimizer around another one may hand the call on to one that does not switch.
        switching = [optimizer for optimizer in outer if _can_train(optimizer)]
        inner = [optimizer for optimizer in _inner_optimizers(self.optimizers) if switches_weights(type(optimizer))]
        return switching or inner

    # ---- its state -------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Raises ValueError naming what a checkpoint cannot hold."""
        pairs = zip(self._all_optimizers, self._made_with, strict=True)
        return {"optimizers": [save_optimizer(optimizer, groups) for optimizer, groups in pairs]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved, groups in zip(self._all_optimizers, state["optimizers"], self._made_with, strict=True):
            load_optimizer(optimizer, saved, groups, self._all_optimizers)

    @override
    def state_tensors(self) -> list[Tensor]:
        pairs = zip(self._all_optimizers, self._made_with, strict=True)
        return [tensor for optimizer, groups in pairs for tensor in optimizer_tensors(optimizer, groups)]


def _can_train(optimizer: Any) -> bool:
    try:
        optimizer.train()
    except AttributeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def _inner_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers that others go around, those that hold them first."""
    inner: list[torch.optim.Optimizer] = []
    pending = list(optimizers)
    while pending:
        for value in vars(pending.pop(0)).values():
            if isinstance(value, torch.optim.Optimizer) and not any(value is o for o in [*optimizers, *inner]):
                inner.append(value)
                pending.append(value)
    return inner
