"""The interface of a submission: a training algorithm that owns its step.

The shortest submission is a YAML file that names a `torch.optim.Optimizer`: see `OptimizerSubmission`, the default
step of one gradient and one update. An algorithm that needs more is a class here:

    class SAM(OptimizerSubmission):
        needs = frozenset({Need.RE_EVALUATE})

        def step(self, ctx): ...

Its keyword arguments are its hyperparameters; the harness refuses any that the signature does not name, and values
outside the ranges that it annotates. A `Wrapper` goes around any other submission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.needs import Need, UndeclaredNeed
from harness.ranks import ALONE, Ranks
from harness.roles import Role
from harness.schedules import Schedule
from harness.seeding import ExampleStream, Selection
from harness.step import StepContext


@dataclass(frozen=True)
class Setup:
    """What a submission is built on: the trainable parameters and the facts it may know."""

    named_parameters: dict[str, nn.Parameter]
    """Trainable parameters in the model's order."""
    nominal_batch: int
    schedule: Schedule
    generator: torch.Generator
    """The submission's own randomness, on the CPU; part of the checkpoint."""
    device_generator: torch.Generator
    """The same on the device of the parameters (the same object on a CPU)."""
    clip_norm: float | None
    """Clip the global gradient norm to this before the update (option of the default step)."""
    no_decay: frozenset[Role]
    """Roles that get no weight decay (option of the default step)."""
    needs: frozenset[Need]
    _roles: dict[str, Role]
    _max_steps: int
    _model: nn.Module
    _ranks: Ranks = ALONE
    _recalibrate: Callable[[int], None] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters.values())

    @property
    def buffers(self) -> list[Tensor]:
        """The model's floating-point buffers, such as BatchNorm statistics: for averages to evaluate."""
        self._require(Need.EVALUATION_WEIGHTS, "the model's buffers")
        return [buffer for buffer in self._model.buffers() if buffer.is_floating_point() and buffer.numel()]

    def recalibrate(self, steps: int) -> None:
        """Within `evaluation_weights`: take the BatchNorm statistics anew, from the examples of the last `steps`
        nominal steps. It is on the clock, one forward for each example; without BatchNorm it costs nothing."""
        self._require(Need.EVALUATION_WEIGHTS, "new BatchNorm statistics")
        if self._recalibrate is not None and steps:
            self._recalibrate(steps)

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every parameter by name."""
        self._require(Need.PARAMETER_ROLES, "parameter roles")
        return self._roles

    @property
    def total_steps(self) -> int:
        """The budget in nominal steps."""
        self._require(Need.TOTAL_STEPS, "the total steps of the budget")
        return self._max_steps

    @property
    def model(self) -> nn.Module:
        """The model, for hooks on its layers."""
        self._require(Need.LAYERS, "the model")
        return self._model

    @property
    def ranks(self) -> Ranks:
        """The processes that share the trial, for a submission that exchanges the gradients itself."""
        self._require(Need.COMMUNICATION, "the other ranks")
        return self._ranks

    def learning_rate_factor(self, step: float) -> float:
        """The schedule's factor for the update made after `step` nominal steps."""
        return self.schedule.factor(step, self._max_steps)

    def decay_groups(self, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Parameter groups of `names` (default: all): with the submission's weight decay, and without by `no_decay`."""
        names = list(self.named_parameters) if names is None else list(names)
        plain = [self.named_parameters[name] for name in names if self._roles[name] not in self.no_decay]
        exempt = [self.named_parameters[name] for name in names if self._roles[name] in self.no_decay]
        groups: list[dict[str, Any]] = [{"params": plain}] if plain else []
        return groups + ([{"params": exempt, "weight_decay": 0.0}] if exempt else [])

    def _require(self, need: Need, asked: str) -> None:
        if need not in self.needs:
            raise UndeclaredNeed(asked, need, "the submission")


class Submission:
    """A training algorithm. Everything it does, its construction included, is on the clock."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def select(self, stream: ExampleStream) -> Selection:
        """The examples of the next step; by default the next nominal batch. Overriding it needs Need.SELECTION."""
        return stream.take(self.setup.nominal_batch)

    def step(self, ctx: StepContext) -> None:
        """One step on one batch."""
        raise TypeError(f"{type(self).__name__} does not define step(ctx)")

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within it the parameters hold the weights to evaluate; their trained values must come back to the bit
        (see `harness.step.swapped`). Overriding it needs Need.EVALUATION_WEIGHTS."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs besides the parameters: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} saved a state but does not define load_state_dict")

    def state_tensors(self) -> list[Tensor]:
        """Every tensor held between steps, to count the bytes; by default those of `state_dict`."""
        return tensors_in(self.state_dict())

    def state_bytes(self) -> int:
        """Bytes held between steps besides the parameters, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.state_tensors()}
        storages.pop(0, None)
        return sum(storages.values())


class OptimizerSubmission(Submission):
    """The default step: one gradient, clipped if asked, learning rates from the schedule, one update."""

    def __init__(self, setup: Setup, optimizers: Sequence[torch.optim.Optimizer], *, closure: bool = False) -> None:
        super().__init__(setup)
        self.optimizers = list(optimizers)
        self.closure = closure
        self._assert_each_parameter_once()
        self._initial = [[group.get("lr") for group in optimizer.param_groups] for optimizer in self.optimizers]
        scheduled = setup.schedule.shape != "constant" or setup.schedule.warmup_fraction > 0
        if scheduled and any(lr is None for lrs in self._initial for lr in lrs):
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise ValueError(
                f"{names} has a parameter group without `lr`, so a schedule cannot act on it; "
                "use schedule=constant schedule.warmup_fraction=0"
            )

    def step(self, ctx: StepContext) -> None:
        if self.closure:
            self.apply_schedule(ctx)
            for optimizer in self.optimizers:
                optimizer.step(lambda: float(self._gradient(ctx)))
            return
        self._gradient(ctx)
        self.update(ctx)

    def update(self, ctx: StepContext) -> None:
        """The update from the gradients in ``.grad``."""
        self.apply_schedule(ctx)
        for optimizer in self.optimizers:
            optimizer.step()

    def apply_schedule(self, ctx: StepContext) -> None:
        factor = self.setup.learning_rate_factor(ctx.step)
        for optimizer, initial in zip(self.optimizers, self._initial, strict=True):
            for group, lr in zip(optimizer.param_groups, initial, strict=True):
                if lr is not None:
                    group["lr"] = lr * factor

    def clip_gradients(self) -> None:
        if self.setup.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.setup.parameters, self.setup.clip_norm, foreach=True)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Optimizers with the `eval()`/`train()` convention of Schedule-Free are switched, and switched back exactly:
        their own way back rounds, which would make the result depend on how often one evaluates."""
        switching: list[Any] = [o for o in self.optimizers if hasattr(o, "eval") and hasattr(o, "train")]
        if not switching:
            yield
            return
        parameters: list[Tensor] = list(self.setup.parameters)
        trained = [parameter.detach().clone() for parameter in parameters]
        for optimizer in switching:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in switching:
                optimizer.train()
            with torch.no_grad():
                torch._foreach_copy_(parameters, trained)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            _restore_dtypes(optimizer, saved)

    def state_tensors(self) -> list[Tensor]:
        return [tensor for optimizer in self.optimizers for tensor in tensors_in(dict(optimizer.state))]

    def _gradient(self, ctx: StepContext) -> Tensor:
        loss = ctx.backward()
        self.clip_gradients()
        return loss

    def _assert_each_parameter_once(self) -> None:
        """By first addresses and elements, since an optimizer may hold a parameter in blocks."""
        claimed = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        addresses = {p.data_ptr() for p in claimed}
        own = self.setup.parameters
        complete = addresses >= {p.data_ptr() for p in own}
        if not complete or sum(p.numel() for p in claimed) != sum(p.numel() for p in own):
            raise ValueError(
                f"the optimizers of {type(self).__name__} claim {len(claimed)} parameters, "
                f"{len(addresses)} of them different, but the model has {len(own)}; each must be claimed once"
            )


class Wrapper(Submission):
    """A submission around another one, named in a YAML's `wrappers`. By itself it changes nothing.

    Its hyperparameters stand beside those of the submission inside, so its names must be its own (`ema_decay`, not
    `decay`). To act on the weights it overrides `step`; to act on the gradient it hands `inner.step` a
    `harness.step.WrappedContext`. State goes into `state_dict` under further keys.
    """

    def __init__(self, setup: Setup, inner: Submission) -> None:
        super().__init__(setup)
        self.inner = inner

    def select(self, stream: ExampleStream) -> Selection:
        return self.inner.select(stream)

    def step(self, ctx: StepContext) -> None:
        self.inner.step(ctx)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with self.inner.evaluation_weights():
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])

    def state_tensors(self) -> list[Tensor]:
        mine = {key: value for key, value in self.state_dict().items() if key != "inner"}
        return self.inner.state_tensors() + tensors_in(mine)


def _restore_dtypes(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Optimizer.load_state_dict casts state to the dtype of its parameter; it may have been wider for a reason."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        state = optimizer.state.get(parameter, {})
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and state[name].dtype != value.dtype:
                state[name] = value.to(state[name].device, copy=True)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []
