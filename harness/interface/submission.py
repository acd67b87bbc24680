"""The interface of a submission: a training algorithm that owns its step.

The shortest submission is a YAML file that names a `torch.optim.Optimizer`: see `OptimizerSubmission`, whose step is
one gradient and one update. An algorithm that needs more is a class:

    class SAM(OptimizerSubmission):
        needs = frozenset({Need.RE_EVALUATE})

        def step(self, ctx): ...

The keyword arguments of its constructor are its hyperparameters. The harness refuses hyperparameters that the signature
does not name, and values outside the ranges that it annotates. A `Wrapper` goes around any other submission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from harness.interface.data_order import ExampleStream, Selection
from harness.interface.model_runner import ModelRunner
from harness.interface.needs import Need, require
from harness.interface.ranks import SINGLE_RANK, Ranks
from harness.interface.roles import MATRIX_ROLES, Role
from harness.interface.schedules import Part, Schedule
from harness.interface.step import StepContext


@dataclass(frozen=True)
class Setup:
    """The arguments of a submission: the trainable parameters, and those facts of the trial that it may know."""

    named_parameters: dict[str, nn.Parameter]
    """Trainable parameters in the model's order."""
    nominal_batch: int
    """Examples per nominal step."""
    schedule: Schedule
    """The learning-rate schedule; see `learning_rate_factor`."""
    generator: torch.Generator
    """The submission's own randomness, on the CPU; part of the checkpoint."""
    device_generator: torch.Generator
    """The same on the device of the parameters (the same object on a CPU)."""
    clip_norm: float | None
    """Clip the global gradient norm to this before the update (option of the default step)."""
    no_decay: frozenset[Role]
    """Roles that get no weight decay (option of the default step)."""
    needs: frozenset[Need]
    """Needs that the submission and its wrappers declare."""
    _roles: dict[str, Role]
    _max_steps: int
    _model: nn.Module
    _ranks: Ranks = SINGLE_RANK
    _recalibrate: Callable[[int], None] | None = None
    compile: bool = False
    """Whether the run has `compile=true`: submissions that can compile their update do so, on the clock."""
    _runner: ModelRunner | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters in the model's order."""
        return list(self.named_parameters.values())

    @property
    def buffers(self) -> list[Tensor]:
        """The model's floating-point buffers, such as BatchNorm statistics. Needs Need.EVALUATION_WEIGHTS."""
        self._require(Need.EVALUATION_WEIGHTS, "the model's buffers")
        return [buffer for buffer in self._model.buffers() if buffer.is_floating_point() and buffer.numel()]

    def recalibrate(self, steps: int) -> None:
        """Recompute the BatchNorm statistics from the examples of the last `steps` nominal steps, in the default order.

        To be called within `evaluation_weights`. On the clock: one forward for each example; nothing for a model
        without BatchNorm, or for 0 steps. Needs Need.EVALUATION_WEIGHTS.
        """
        self._require(Need.EVALUATION_WEIGHTS, "new BatchNorm statistics")
        if self._recalibrate is not None and steps:
            self._recalibrate(steps)

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every parameter by name. Needs Need.PARAMETER_ROLES."""
        self._require(Need.PARAMETER_ROLES, "parameter roles")
        return self._roles

    @property
    def total_steps(self) -> int:
        """The budget in nominal steps. Needs Need.TOTAL_STEPS."""
        self._require(Need.TOTAL_STEPS, "the total steps of the budget")
        return self._max_steps

    @property
    def model(self) -> nn.Module:
        """The model, for hooks on its layers. Needs Need.LAYERS."""
        self._require(Need.LAYERS, "the model")
        return self._model

    @property
    def runner(self) -> ModelRunner:
        """The model with what its passes need, for a submission that runs them itself. Needs Need.OWN_PASSES."""
        self._require(Need.OWN_PASSES, "the model's passes")
        assert self._runner is not None
        return self._runner

    @property
    def ranks(self) -> Ranks:
        """The processes that share the trial, for a submission that exchanges gradients itself. Needs
        Need.COMMUNICATION."""
        self._require(Need.COMMUNICATION, "the other ranks")
        return self._ranks

    def learning_rate_factor(self, step: float, part: Part = "matrices") -> float:
        """The schedule's factor on the learning rate for the update made after `step` nominal steps, from 0 to 1 (a
        table of factors may exceed 1).

        part: of the parameters whose factor it is; see `schedule_part`.
        """
        return self.schedule.factor(step, self._max_steps, part)

    def learning_rate_factors(self, step: float) -> dict[Part, float]:
        """`learning_rate_factor` of both parts of the parameters."""
        matrices = self.learning_rate_factor(step)
        apart = self.schedule.rest_decay_fraction is not None
        return {"matrices": matrices, "rest": self.learning_rate_factor(step, "rest") if apart else matrices}

    def schedule_part(self, group: Mapping[str, Any]) -> Part:
        """The part of the parameters that a parameter group belongs to, for a schedule that treats the two apart.

        Raises ValueError where a group has parameters of both.
        """
        if self.schedule.rest_decay_fraction is None:
            return "matrices"
        # By addresses, since an optimizer may hold a parameter as a view of it.
        parts = {
            "matrices" if self._roles[name] in MATRIX_ROLES else "rest"
            for address in {parameter.data_ptr() for parameter in group["params"] if parameter.numel()}
            for name, parameter in self.named_parameters.items()
            if parameter.data_ptr() == address
        }
        if len(parts) > 1:
            raise ValueError(
                f"schedule.rest_decay_fraction={self.schedule.rest_decay_fraction}: a parameter group has hidden "
                "matrices and other parameters, which cannot follow two schedules; make the groups of "
                "setup.decay_groups(), or leave schedule.rest_decay_fraction out"
            )
        return "matrices" if parts == {"matrices"} else "rest"

    def decay_groups(self, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, of the parameters `names` (default: all): one with the submission's
        weight decay, and one without for the roles in `no_decay`. Empty groups are left out. Where the schedule treats
        hidden matrices and the rest apart, so do the groups."""
        names = list(self.named_parameters) if names is None else list(names)
        # _roles and not roles: exempting roles is an option of the recipe and takes no Need.
        if self.schedule.rest_decay_fraction is not None:
            matrices = [name for name in names if self._roles[name] in MATRIX_ROLES]
            parts = [matrices, [name for name in names if self._roles[name] not in MATRIX_ROLES]]
        else:
            parts = [names]
        groups: list[dict[str, Any]] = []
        for part in parts:
            decayed = [self.named_parameters[name] for name in part if self._roles[name] not in self.no_decay]
            exempt = [self.named_parameters[name] for name in part if self._roles[name] in self.no_decay]
            groups += [{"params": decayed}] if decayed else []
            groups += [{"params": exempt, "weight_decay": 0.0}] if exempt else []
        return groups

    def _require(self, need: Need, asked: str) -> None:
        require(need, self.needs, asked, "the submission")


class Submission:
    """A training algorithm. Everything it does, its construction included, is on the clock."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Capabilities that it uses; read before any model exists."""
    host_waits: ClassVar[str] = ""
    """When the host waits for the device because it has to decide something, in words, for the table of algorithms;
    empty for never. Each wait costs a GPU the time in which the host could have run ahead."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @classmethod
    def check_hyperparameters(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError where hyperparameters do not go together. Called before data are loaded.

        values: the hyperparameters that are given, by name; each by itself is in its range.
        """

    @classmethod
    def describe_host_waits(cls, values: Mapping[str, Any]) -> str:
        """`host_waits` with the hyperparameters `values`, for a class whose waits depend on them."""
        return cls.host_waits

    def select(self, stream: ExampleStream) -> Selection:
        """The examples of the next step; by default the next nominal batch. Overriding it needs Need.SELECTION.

        It is on the clock. Every rank calls it, and all must return the same.
        """
        return stream.take(self.setup.nominal_batch)

    def step(self, ctx: StepContext) -> None:
        """One step on one batch: move the parameters."""
        raise TypeError(f"{type(self).__name__} does not define step(ctx)")

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within it the parameters hold the weights to evaluate; afterwards the trained values are back to the bit (see
        `harness.interface.swapped`). Overriding it needs Need.EVALUATION_WEIGHTS."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs besides the parameters: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned. Raises ValueError where a subclass overrides only `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} saved a state but does not define load_state_dict")

    def record_summary(self) -> dict[str, Any]:
        """Facts about the training for the record, as numbers, texts and None by name: what happened that no column
        shows, such as when a method switched to another. Asked for once, at the end."""
        return {}

    def state_tensors(self) -> list[Tensor]:
        """Every tensor held between steps, to count the bytes; by default those of `state_dict`."""
        return collect_tensors(self.state_dict())

    def state_bytes(self) -> int:
        """Bytes held between steps besides the parameters; a storage that several tensors share counts once."""
        pieces = [piece for tensor in self.state_tensors() for piece in plain_tensors(tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in pieces}
        # Tensors without elements have the address 0.
        storages.pop(0, None)
        return sum(storages.values())


class FileSubmission(Submission):
    """A submission whose algorithm is a file of the user's, `optimizer.path`, written for another interface.

    The class itself stands for all such files; `load` makes the one of a file. Its hyperparameters are those that the
    file asks for, so its signature names none.
    """

    open_hyperparameters: ClassVar[bool] = True
    """Hyperparameters have any name."""
    remarks: ClassVar[tuple[str, ...]] = ()
    """What the record of a trial should say of the file."""
    modules: ClassVar[frozenset[str]] = frozenset()
    """Names in sys.modules of the file and of the modules beside it that it has loaded."""

    @classmethod
    def load(cls, path: str, options: Any, device: torch.device | None = None) -> type[FileSubmission]:
        """The subclass of the file at `path`, which is run for that. options: the configuration of the optimizer
        (`harness.config.schema.Optimizer`). device: of the trial; None where the file is only checked.

        Raises UserError with all that is wrong with the file and with the options for it.
        """
        raise NotImplementedError

    @classmethod
    def read_needs(cls, path: str) -> frozenset[Need]:
        """What the file at `path` needs besides the needs of the class, found without running it. Raises UserError."""
        return frozenset()

    @classmethod
    def read_search_space(cls, path: str) -> dict[str, Any]:
        """The search space in a file of the other interface, in the shape of `optimizer.search_space`. Raises
        UserError."""
        raise NotImplementedError


class OptimizerSubmission(Submission):
    """The default step: one gradient, clipped if asked, learning rates from the schedule, one update."""

    def __init__(self, setup: Setup, optimizers: Sequence[torch.optim.Optimizer], *, closure: bool = False) -> None:
        """closure: hand the gradient to the optimizers as a closure, as LBFGS needs it.

        Optimizers with the `eval()`/`train()` convention of Schedule-Free are switched to train. With `Setup.compile`,
        those that have a method `compile_update()` are told to compile their update.

        Raises ValueError unless the optimizers hold each parameter once, and where a schedule finds no `lr` to act on.
        """
        super().__init__(setup)
        self.optimizers = list(optimizers)
        self.closure = closure
        if setup.compile:
            for optimizer in self.optimizers:
                getattr(optimizer, "compile_update", lambda: None)()
        for optimizer in self._switching_optimizers():
            optimizer.train()
        self._check_each_parameter_is_claimed_once()
        # Before a resume loads the groups: their lr is then one that the schedule has scaled already.
        self._initial_rates = [[group.get("lr") for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._initial_decays = [
            [group.get("weight_decay") for group in optimizer.param_groups] for optimizer in self.optimizers
        ]
        self._parts = [[setup.schedule_part(group) for group in o.param_groups] for o in self.optimizers]
        scheduled = setup.schedule.shape != "constant" or setup.schedule.warmup_fraction > 0
        if scheduled and any(lr is None for lrs in self._initial_rates for lr in lrs):
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise ValueError(
                f"{names} has a parameter group without `lr`, so a schedule cannot act on it; "
                "use schedule=constant schedule.warmup_fraction=0"
            )

    @override
    def step(self, ctx: StepContext) -> None:
        if self.closure:
            self.apply_schedule(ctx)
            for optimizer in self.optimizers:
                optimizer.step(self.make_closure(ctx))
            return
        self._gradient(ctx)
        self.update(ctx)

    def make_closure(self, ctx: StepContext) -> Callable[[], Any]:
        """A function that puts the gradient into ``.grad`` and returns the loss (a scalar without a graph), also where
        gradients are switched off, as they are in the `step` of many optimizers."""

        def closure() -> Tensor:
            with torch.enable_grad():
                # A copy: an optimizer that changes its loss in place must not change the one that is recorded.
                return self._gradient(ctx).clone()

        return closure

    def update(self, ctx: StepContext) -> None:
        """Set the learning rates and update the parameters from the gradients in ``.grad``."""
        self.apply_schedule(ctx)
        for optimizer in self.optimizers:
            optimizer.step()

    def apply_schedule(self, ctx: StepContext) -> None:
        """Set the learning rate of every parameter group to its initial one times the schedule's factor, and its weight
        decay where the schedule says so."""
        factors = self.setup.learning_rate_factors(ctx.step)
        for optimizer, initial, decays, parts in zip(
            self.optimizers, self._initial_rates, self._initial_decays, self._parts, strict=True
        ):
            for group, lr, decay, part in zip(optimizer.param_groups, initial, decays, parts, strict=True):
                if lr is not None:
                    group["lr"] = lr * factors[part]
                if decay is not None and self.setup.schedule.scale_weight_decay:
                    group["weight_decay"] = decay * factors[part]

    def clip_gradients(self) -> None:
        """Clip the global norm of ``.grad`` to `Setup.clip_norm`, if that is given."""
        if self.setup.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.setup.parameters, self.setup.clip_norm, foreach=True)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """As `Submission.evaluation_weights`; optimizers with the `eval()`/`train()` convention of Schedule-Free are
        switched."""
        switching = self._switching_optimizers()
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
            # train() rounds on the way back, so without the copy the result would depend on the number of evaluations.
            with torch.no_grad():
                torch._foreach_copy_(parameters, trained)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            restore_tensors(optimizer, saved)

    @override
    def record_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for optimizer in self.optimizers:
            summary |= getattr(optimizer, "record_summary", dict)()
        return summary

    @override
    def state_tensors(self) -> list[Tensor]:
        return [tensor for optimizer in self.optimizers for tensor in collect_tensors(dict(optimizer.state))]

    def _gradient(self, ctx: StepContext) -> Tensor:
        loss = ctx.backward()
        self.clip_gradients()
        return loss

    def _switching_optimizers(self) -> list[Any]:
        """Those that hold other weights in training than in an evaluation, and switch between the two."""
        return [optimizer for optimizer in self.optimizers if switches_weights(type(optimizer))]

    def _check_each_parameter_is_claimed_once(self) -> None:
        # By addresses and elements and not by identity, since an optimizer may hold a parameter in blocks.
        claimed = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        addresses = {p.data_ptr() for p in claimed}
        parameters = self.setup.parameters
        complete = addresses >= {p.data_ptr() for p in parameters}
        # The sum of elements finds parameters that are claimed twice, which a set of addresses does not.
        if not complete or sum(p.numel() for p in claimed) != sum(p.numel() for p in parameters):
            raise ValueError(
                f"the optimizers of {type(self).__name__} claim {len(claimed)} parameters, "
                f"{len(addresses)} of them different, but the model has {len(parameters)}; each must be claimed once"
            )


class Wrapper(Submission):
    """A submission around another one, named in a YAML's `wrappers`. This base class changes nothing.

    Its hyperparameters stand beside those of the submission inside, so their names must differ (`ema_decay`, not
    `decay`). To act on the weights it overrides `step`; to act on the gradient it hands `inner.step` a
    `harness.interface.WrappedContext`. State goes into `state_dict` under further keys.
    """

    def __init__(self, setup: Setup, inner: Submission) -> None:
        super().__init__(setup)
        self.inner = inner

    @override
    def select(self, stream: ExampleStream) -> Selection:
        return self.inner.select(stream)

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(ctx)

    @contextmanager
    @override
    def evaluation_weights(self) -> Iterator[None]:
        with self.inner.evaluation_weights():
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])

    @override
    def record_summary(self) -> dict[str, Any]:
        return self.inner.record_summary()

    @override
    def state_tensors(self) -> list[Tensor]:
        # The inner submission may hold tensors that are not in its state_dict, so it is asked itself.
        wrapper_state = {key: value for key, value in self.state_dict().items() if key != "inner"}
        return self.inner.state_tensors() + collect_tensors(wrapper_state)


def restore_tensors(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Undo that Optimizer.load_state_dict casts state to the dtype of its parameter and moves it to its device.

    NAdam's mu_product, for example, does not survive bfloat16, and on a GPU every step would wait to read it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        state = optimizer.state.get(parameter, {})
        for name, value in saved["state"].get(index, {}).items():
            if name in state:
                state[name] = _restored(state[name], value)


def _restored(loaded: Any, saved: Any) -> Any:
    """`loaded` with the tensors of `saved` where they were cast or moved."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        # A copy: the optimizer updates its state in place, and `saved` belongs to the caller.
        return saved.clone() if loaded.dtype != saved.dtype or loaded.device != saved.device else loaded
    if isinstance(loaded, dict) and isinstance(saved, dict):
        loaded.update({key: _restored(loaded[key], value) for key, value in saved.items() if key in loaded})
    elif type(loaded) in (list, tuple) and type(saved) is type(loaded) and len(saved) == len(loaded):
        return type(loaded)(map(_restored, loaded, saved))
    return loaded


def collect_tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in collect_tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in collect_tensors(item)]
    return []


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that a tensor is made of: itself, or those inside of a subclass that wraps others, as
    quantised state does."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [piece for name in flatten()[0] for piece in plain_tensors(getattr(tensor, name))]


def switches_weights(cls: type[Any]) -> bool:
    """Whether a class of optimizers has the `eval()`/`train()` convention of Schedule-Free."""
    return callable(getattr(cls, "eval", None)) and callable(getattr(cls, "train", None))
