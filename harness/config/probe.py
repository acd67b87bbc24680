"""A few steps of an optimizer of another library on small parameters, before data are loaded.

They show what no signature tells: whether the class trains these shapes at all, whether a checkpoint can hold its
state, and whether it is what its name says. Where they fail, the options that may help are tried, and the message
names the one that does.

The parameters have the names, roles and kinds of shapes of the workload's model, which is laid out without memory. They
are on the CPU and compiled code runs uncompiled, so that it takes milliseconds.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import pickle
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.config import hyperparameters
from harness.config.assembly import assemble
from harness.config.schema import FallbackOptimizer, Optimizer, OptimizerPart, Run
from harness.interface.any_optimizer import (
    REST,
    AnyOptimizer,
    Assembly,
    Part,
    claim_parameters,
    filled_arguments,
    requires_base,
    requires_closure,
    takes_model,
)
from harness.interface.needs import Need
from harness.interface.roles import Role, parameter_roles
from harness.interface.schedules import Schedule
from harness.interface.submission import Setup, Submission

_SIX_LINES = "write a submission of six lines (docs/any_optimizer.md)"
"""What remains where no option helps."""
LARGEST = 64
"""Dimensions of parameters above it are cut to little more: quantised state begins at 4,096 elements."""
STEPS = 4
"""Steps of the probe, the first half of them before its state is saved."""
_LONG = 12
"""Steps in which an optimizer around another one should have done something."""
_OF_A_KIND = 2
"""Parameters of a kind that are trained."""
_ALIKE = 0.02
"""Relative distance below which two trajectories are those of one method."""


@dataclass(frozen=True)
class Examination:
    """What the probe has shown."""

    problems: tuple[str, ...] = ()
    """Why the class cannot be trained, each with the remedy."""
    remarks: tuple[str, ...] = ()
    """What its record says of it."""
    compiles: bool = False
    """It compiles code of its own."""
    gradient_first: bool = False
    """Its `step` with a closure begins with the gradient that is there."""


def examine(run: Run) -> Examination:
    """What the probe shows of the submission of `run`; nothing where it is no torch.optim.Optimizer."""
    cls = hyperparameters.import_algorithm(run.optimizer.class_path)
    if issubclass(cls, Submission):
        return Examination()
    trained = [run.workload[key] for key in ("class_path", "model", "max_steps")]
    key = json.dumps([run.algorithm(), *trained], default=str)
    if (key, cls) not in _examined:
        if len(_examined) > _MOST_EXAMINED:
            _examined.clear()
        _examined[key, cls] = _examine_on_model(run, cls)
    return _examined[key, cls]


_examined: dict[tuple[str, type[Any]], Examination] = {}
_MOST_EXAMINED = 256


# ---- the problem ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """What is trained: parameters like those of a workload's model."""

    parameters: dict[str, tuple[tuple[int, ...], Role]]
    """Shape and role by name."""
    schedule: Schedule
    max_steps: int
    workload: str

    def build(self, options: Optimizer, assembly: Assembly, needs: frozenset[Need]) -> AnyOptimizer:
        """The submission on new parameters, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        model = nn.Module()
        for name, (shape, _) in self.parameters.items():
            owner, _, leaf = name.rpartition(".")
            # Apart from 0, since some rules are relative to the norm of a parameter.
            value = torch.randn(shape, generator=generator) * 0.5 + 0.1
            _submodule(model, owner).register_parameter(leaf, nn.Parameter(value))
        roles = {name: role for name, (_, role) in self.parameters.items()}
        setup = Setup(
            named_parameters=dict(model.named_parameters()),
            nominal_batch=1,
            schedule=self.schedule,
            generator=generator,
            device_generator=generator,
            clip_norm=options.clip_norm,
            no_decay=frozenset(Role(role) for role in options.no_decay),
            needs=needs,
            _roles=roles,
            _max_steps=self.max_steps,
            _model=model,
        )
        return AnyOptimizer(setup, assembly)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    return model


def _lay_out(run: Run) -> dict[str, tuple[tuple[int, ...], Role]]:
    """Clipped shapes and roles of the trainable parameters of the workload's model."""
    workload = hyperparameters.import_class(run.workload["class_path"], "workload.class_path")(run.spec)
    # Without memory: a model of billions of parameters is laid out in milliseconds.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = workload.build_model()
    roles = parameter_roles(model, workload.role_patterns())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    large = sorted({size for parameter in trained.values() for size in parameter.shape if size > LARGEST})
    # Different sizes stay different: some classes take only square matrices.
    clipped = {size: LARGEST + 16 * number for number, size in enumerate(large, 1)}
    return {
        name: (tuple(clipped.get(size, size) for size in parameter.shape), roles[name])
        for name, parameter in trained.items()
    }


class _Context:
    """Stands in for a step's context: a smooth loss of the parameters, with noise that depends on the step."""

    def __init__(self, parameters: list[nn.Parameter], step: float) -> None:
        self.parameters, self.step = parameters, step
        self.first_loss: Tensor | None = None
        self.moved_within = False

    def backward(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        before = [parameter.detach().clone() for parameter in self.parameters]
        loss = self._loss()
        loss.backward()
        # A hook that updates within the pass would see a part of the gradient where a step has several micro-batches.
        self.moved_within = self.moved_within or not _equal(before, self.parameters)
        return loss.detach()

    def loss_and_gradients(self, *, create_graph: bool = False) -> tuple[Tensor, list[Tensor]]:
        loss = self._loss()
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters, create_graph=create_graph))

    def _loss(self) -> Tensor:
        noise = torch.Generator().manual_seed(int(self.step))
        targets = [torch.randn(p.shape, generator=noise) for p in self.parameters]
        squares = [(p - target).square().sum() for p, target in zip(self.parameters, targets, strict=True)]
        quartics = [p.pow(4).sum() for p in self.parameters]
        # Sums, so that the gradient of an element is far above any epsilon, whatever the size of its parameter.
        return 0.1 * torch.stack(squares).sum() + 0.01 * torch.stack(quartics).sum()


# ---- the attempt ---------------------------------------------------------------------------------------------------


@dataclass
class _Attempt:
    """What a few steps have shown."""

    weights: list[Tensor]
    group_keys: set[str]
    unscheduled: list[str]
    resumes: bool = True
    is_base: bool = False
    """It makes the steps of the optimizer that it goes around."""
    gradient_first: bool = False
    moved_within: bool = False
    groups: list[dict[str, Any]] = field(default_factory=list)


class _CannotSave(ValueError):
    """A checkpoint cannot hold the state."""


def _needs(options: Optimizer) -> frozenset[Need]:
    return frozenset({*options.needs, Need.RE_EVALUATE, Need.LAYERS})


def _attempt(options: Optimizer, problem: _Problem) -> _Attempt:
    """Train a few steps, and again with an interruption. Raises whatever the class raises."""
    needs = _needs(options)
    assembly, first_is_needed = assemble(options), False
    if options.closure or requires_closure(assembly.main.cls):
        assembly, first_is_needed = _with_gradient_where_needed(options, assembly, problem)
    submission = problem.build(options, assembly, needs)
    moved_within = False
    for step in range(STEPS // 2):
        moved_within |= _step(submission, problem, step)
    with submission.evaluation_weights():
        pass
    resumed = problem.build(options, assembly, needs)
    resumed.load_state_dict(_saved(submission))
    with torch.no_grad():
        for copy, parameter in zip(resumed.setup.parameters, submission.setup.parameters, strict=True):
            copy.copy_(parameter)
    after = torch.get_rng_state()
    for step in range(STEPS // 2, STEPS):
        moved_within |= _step(submission, problem, step)
    torch.set_rng_state(after)
    for step in range(STEPS // 2, STEPS):
        _step(resumed, problem, step)
    groups = [group for optimizer in submission.optimizers for group in optimizer.param_groups]
    is_base = False
    if assembly.base is not None:
        # As long as a period of wrappers that act on some of the steps.
        around, alone = problem.build(options, assembly, needs), problem.build(options, Assembly(assembly.base), needs)
        for step in range(_LONG):
            _step(around, problem, step)
            _step(alone, problem, step)
        is_base = _same_bits(around, alone)
    return _Attempt(
        is_base=is_base,
        weights=_weights(submission),
        group_keys={key for group in groups for key in group},
        unscheduled=submission.unscheduled_rates,
        resumes=_same_bits(submission, resumed),
        gradient_first=first_is_needed,
        moved_within=moved_within,
        groups=groups,
    )


def _with_gradient_where_needed(options: Optimizer, assembly: Assembly, problem: _Problem) -> tuple[Assembly, bool]:
    """The assembly with a gradient before `step`, if that makes a difference: its closure alone is not enough then."""
    needs = _needs(options)
    from_gradient = assemble(options, gradient_first=True)
    with_gradient = problem.build(options, from_gradient, needs)
    _step(with_gradient, problem, 0)
    try:
        without = problem.build(options, assembly, needs)
        _step(without, problem, 0)
    except Exception:
        return from_gradient, True
    differs = not _same_bits(with_gradient, without)
    return (from_gradient, True) if differs else (assembly, False)


def _step(submission: AnyOptimizer, problem: _Problem, step: int) -> bool:
    """One step; whether a parameter moved within a backward pass."""
    for parameter in submission.setup.parameters:
        parameter.grad = None
    ctx = _Context(submission.setup.parameters, step % problem.max_steps)
    submission.step(ctx)  # type: ignore[arg-type]
    return ctx.moved_within


def _saved(submission: AnyOptimizer) -> dict[str, Any]:
    """Its state as it comes out of a checkpoint."""
    buffer = io.BytesIO()
    try:
        torch.save(submission.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    # A bug of ours is none of the library's.
    except (ValueError, TypeError, AttributeError, RuntimeError, pickle.PickleError) as error:
        raise _CannotSave(_first_line(error)) from error
    assert isinstance(saved, dict)
    submission.state_bytes()
    return saved


def _weights(submission: AnyOptimizer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in submission.setup.parameters]


def _same_bits(first: AnyOptimizer, second: AnyOptimizer) -> bool:
    return _equal(first.setup.parameters, second.setup.parameters)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    # A rate that diverges makes NaN, which is different from itself.
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def _examine_on_model(run: Run, cls: type[torch.optim.Optimizer]) -> Examination:
    options, laid_out = run.optimizer, _lay_out(run)
    roles = {name: role for name, (_, role) in laid_out.items()}
    keys = {"optimizer.param_groups": list(options.param_groups)}
    if options.fallback is not None and options.fallback.parameters:
        keys["optimizer.fallback.parameters"] = [*options.fallback.parameters, REST]
    # Which key claims a parameter, checked on all of them.
    claimed_by: dict[str, tuple[str, ...]] = dict.fromkeys(roles, ())
    for option, of_option in keys.items():
        try:
            claims = claim_parameters(of_option, roles, option) if of_option else {}
        except ValueError as error:
            return Examination(problems=(str(error),))
        for key, names in claims.items():
            claimed_by |= {name: (*claimed_by[name], key) for name in names}
    # Layers repeat, and a few of each kind show the same.
    counts: Counter[Any] = Counter()
    parameters = {}
    for name, (shape, role) in laid_out.items():
        # Rules of matrices may take some shapes and not others.
        kind = (shape if len(shape) == 2 else len(shape), role, claimed_by[name])
        counts[kind] += 1
        if counts[kind] <= _OF_A_KIND:
            parameters[name] = (shape, role)
    problem = _Problem(parameters, run.schedule, run.workload["max_steps"], run.workload.get("name", ""))
    return _examine(options, problem, cls)


# ---- what it means -------------------------------------------------------------------------------------------------


def _examine(options: Optimizer, problem: _Problem, cls: type[torch.optim.Optimizer]) -> Examination:
    with _undisturbed() as compilation:
        try:
            attempt = _attempt(options, problem)
        except Exception as error:
            return Examination(problems=(_explain(error, options, problem, cls),))
        problems = list(_silent_faults(options, problem, cls, attempt))
    remarks = []
    decays = problem.schedule.shape != "constant"
    averages = re.search(r"schedulefree|^SF[A-Z]", cls.__name__, re.IGNORECASE)
    if averages and decays:
        remarks.append(
            f"{cls.__name__} averages the weights by itself, and schedule.shape={problem.schedule.shape} decays its "
            "rate as well; schedule=constant leaves that out"
        )
    for name, parameter in inspect.signature(cls.step).parameters.items():
        if parameter.default is None and name not in ("self", "closure", "loss"):
            remarks.append(f"{cls.__name__}: nothing gives `{name}` to its step")
    if attempt.is_base:
        remarks.append(f"{cls.__name__} made the same {_LONG} steps as its base alone; is that its method?")
    if attempt.unscheduled:
        remarks.append(f"{cls.__name__}: the schedule does not change {', '.join(attempt.unscheduled)}")
    if not attempt.resumes:
        remarks.append(
            f"{cls.__name__} keeps something that no checkpoint holds: an interrupted trial ends elsewhere; "
            f"{_SIX_LINES} that saves it"
        )
    return Examination(tuple(problems), tuple(remarks), compilation.seen, attempt.gradient_first)


def _explain(error: Exception, options: Optimizer, problem: _Problem, cls: type[torch.optim.Optimizer]) -> str:
    """One sentence: what went wrong, and the option that helps."""
    path = options.class_path
    # A key of ours that does not fit the model has said what to do.
    if isinstance(error, ValueError) and str(error).startswith("optimizer."):
        return str(error)
    if isinstance(error, _CannotSave):
        return f"optimizer.class_path={path}: a checkpoint cannot hold its state ({error}); {_SIX_LINES}"
    model = f"the parameters of {problem.workload}"
    fault = f"optimizer.class_path={path}: {cls.__name__} fails on {model} ({_first_line(error)})"
    for text, changed, changed_problem in _remedies(options, problem, cls):
        try:
            _attempt(changed, changed_problem)
        except Exception:
            continue
        return f"{fault}; add {text}"
    return f"{fault}; {_SIX_LINES}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return (text[:157] + "...") if len(text) > 160 else (text or type(error).__name__)


_SGD = OptimizerPart(class_path="torch.optim.SGD", hyperparameters={"lr": 0.1})
_ADAMW = FallbackOptimizer(class_path="torch.optim.AdamW", hyperparameters={"lr": 1e-3})
_Remedy = tuple[str, Optimizer, _Problem]


def _remedies(options: Optimizer, problem: _Problem, cls: type[torch.optim.Optimizer]) -> Iterator[_Remedy]:
    """Options that may help, the likely ones first, alone and then in pairs."""
    singles = list(_single_remedies(options, cls))
    for text, change in singles:
        yield text, *change(options, problem)
    for number, (text, change) in enumerate(singles):
        for other_text, other in singles[number + 1 :]:
            yield f"{text} {other_text}", *other(*change(options, problem))


_Change = Callable[[Optimizer, _Problem], tuple[Optimizer, _Problem]]


def _single_remedies(options: Optimizer, cls: type[torch.optim.Optimizer]) -> Iterator[tuple[str, _Change]]:
    def setting(**update: Any) -> _Change:
        return lambda optimizer, problem: (optimizer.model_copy(update=update), problem)

    if not options.closure and not requires_closure(cls):
        yield "optimizer.closure=true", setting(closure=True)
    yield (
        "schedule=constant schedule.warmup_fraction=0",
        lambda optimizer, problem: (optimizer, _constant(problem)),
    )
    if Need.SECOND_DERIVATIVES not in options.needs:
        needs = [*options.needs, Need.SECOND_DERIVATIVES]
        yield f"optimizer.needs=[{','.join(needs)}]", setting(needs=needs)
    if "base" in filled_arguments(cls).values() and options.base is None:
        yield "optimizer.base.class_path=torch.optim.SGD optimizer.base.hyperparameters.lr=0.1", setting(base=_SGD)
    if options.takes is None:
        yield "optimizer.takes=named_parameters", setting(takes="named_parameters")
        if not takes_model(cls):
            yield "optimizer.takes=model", setting(takes="model")
    if not options.param_groups:
        for flag in _flags(cls):
            groups: dict[str, dict[str, Any]] = {Role.HIDDEN_MATRIX: {flag: True}, "rest": {flag: False}}
            text = f"optimizer.param_groups='{{hidden_matrix: {{{flag}: true}}, rest: {{{flag}: false}}}}'"
            yield text, setting(param_groups=groups)
    if options.fallback is None:
        yield (
            "optimizer.fallback.class_path=torch.optim.AdamW optimizer.fallback.hyperparameters.lr=0.001",
            setting(fallback=_ADAMW),
        )
    if options.effective_hyperparameters.get("lr") is None and "lr" in hyperparameters.signature_hyperparameters(cls):
        yield (
            "optimizer.hyperparameters.lr=0.001",
            setting(hyperparameters=options.hyperparameters | {"lr": 0.001}),
        )


def _constant(problem: _Problem) -> _Problem:
    schedule = problem.schedule.model_copy(update={"shape": "constant", "warmup_fraction": 0.0, "table": ()})
    return _Problem(problem.parameters, schedule, problem.max_steps, problem.workload)


# ---- what would train as something else ----------------------------------------------------------------------------

_UPDATED_FROM_OUTSIDE = re.compile(r"(update|estimate|refresh)_\w*(hess|curv|fisher|precond)\w*")
_GENERIC_KEYS = {"params", "param_names", "step", "foreach", "fused", "capturable", "differentiable", "maximize"}


def _silent_faults(
    options: Optimizer, problem: _Problem, cls: type[torch.optim.Optimizer], attempt: _Attempt
) -> Iterator[str]:
    source = _source(cls)
    if attempt.moved_within:
        yield (
            f"optimizer.class_path={options.class_path}: {cls.__name__} updates parameters within the backward pass, "
            f"where several micro-batches have only a part of the gradient; {_SIX_LINES}"
        )
    for name in dir(cls):
        if _UPDATED_FROM_OUTSIDE.fullmatch(name) and f".{name}(" not in source and not hasattr(torch.optim.Adam, name):
            yield (
                f"optimizer.class_path={options.class_path}: nothing calls {name}(), without which "
                f"{cls.__name__} is another method; {_SIX_LINES}"
            )
    # Whoever sets groups has decided; `optimizer.param_groups={rest: {}}` leaves all keys out on purpose.
    unset = _selecting_keys(cls, source) - attempt.group_keys - _GENERIC_KEYS - _signature_names(cls)
    is_adam = cls.__name__.lower() in ("adam", "adamw") or not hyperparameters.checks_itself(cls)
    if unset and not options.param_groups and not is_adam and _runs_as_adam(options, problem, attempt):
        required = set(re.findall(r"\bgroup\[['\"](\w+)['\"]\]", source)) - attempt.group_keys - _GENERIC_KEYS
        keys = ", ".join(f"{key}: VALUE" for key in [*sorted(unset), *sorted(required - unset)])
        yield (
            f"optimizer.class_path={options.class_path}: no parameter group has {' or '.join(sorted(unset))}, "
            f"without which {cls.__name__} runs as Adam; add "
            f"optimizer.param_groups='{{ROLE: {{{keys}}}, rest: {{}}}}'"
        )


def _runs_as_adam(options: Optimizer, problem: _Problem, attempt: _Attempt) -> bool:
    """Whether it made the steps of Adam, with or without decoupled weight decay."""
    group = attempt.groups[0]
    arguments: dict[str, Any] = {key: group[key] for key in ("betas", "eps", "weight_decay") if key in group}
    if "betas" not in arguments or len(arguments["betas"]) != 2:
        return False
    needs = _needs(options)
    plain = options.model_copy(update={"no_decay": []})
    start = problem.build(plain, Assembly(Part(torch.optim.SGD, {"lr": 0.0})), needs)
    for cls in (torch.optim.AdamW, torch.optim.Adam):
        # The rate at the start, which the schedule has changed in the group.
        arguments["lr"] = options.effective_hyperparameters.get("lr") or _default_rate(options)
        try:
            reference = problem.build(plain, Assembly(Part(cls, arguments)), needs)
        except (TypeError, ValueError):
            return False
        for step in range(STEPS):
            _step(reference, problem, step)
        moves = [a - b for a, b in zip(_weights(reference), _weights(start), strict=True)]
        distances = [a - b for a, b in zip(attempt.weights, _weights(reference), strict=True)]
        if _norm(distances) < _ALIKE * _norm(moves):
            return True
    return False


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def _default_rate(options: Optimizer) -> float:
    cls = hyperparameters.import_algorithm(options.class_path)
    default = inspect.signature(cls.__init__).parameters["lr"].default
    return float(default) if isinstance(default, int | float) else 1e-3


def _source(cls: type[Any]) -> str:
    """The source of the class and of its bases outside of torch; empty where there is none."""
    texts = []
    for base in cls.__mro__:
        if base is not object and not base.__module__.startswith(("torch.", "abc")):
            try:
                texts.append(inspect.getsource(base))
            except (OSError, TypeError):
                continue
    return "\n".join(texts)


def _optional_keys(source: str) -> set[str]:
    """Keys of parameter groups that the source asks for and can do without."""
    asked = re.findall(r"['\"](\w+)['\"] (?:not )?in (?:param_)?group\b", source)
    return {*asked, *re.findall(r"\bgroup\.get\(\s*['\"](\w+)['\"]", source)}


def _selecting_keys(cls: type[Any], source: str) -> set[str]:
    """Those of them that select what the class is named for: its documentation speaks of them, or it asks whether a
    group has them."""
    tested = set(re.findall(r"['\"](\w+)['\"] (?:not )?in (?:param_)?group\b", source))
    documented = set(re.findall(r"\w+", cls.__doc__ or ""))
    return {key for key in _optional_keys(source) if key in documented or key in tested}


def _flags(cls: type[Any]) -> list[str]:
    """Keys of parameter groups that look like a switch between two rules."""
    keys = _optional_keys(_source(cls)) | set(re.findall(r"\bgroup\[['\"](\w+)['\"]\]", _source(cls)))
    return sorted(key for key in keys if key.startswith(("use_", "is_")) and key not in _signature_names(cls))


def _signature_names(cls: type[Any]) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


# ---- leaving no trace ----------------------------------------------------------------------------------------------


@dataclass
class _Compilation:
    seen: bool = False


@contextmanager
def _undisturbed() -> Iterator[_Compilation]:
    """Random numbers come back as they were, warnings are not shown, and compiled code runs uncompiled; whether there
    is any."""
    compilation = _Compilation()
    # The generator that numpy's functions share, which a library may draw from.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        stack.enter_context(_uncompiled(compilation))
        try:
            yield compilation
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _uncompiled(compilation: _Compilation) -> Iterator[None]:
    """Within it compiled code runs uncompiled, and `compilation` hears of it."""
    compile_ = torch.compile
    with ExitStack() as stack:
        # Importing the compiler takes seconds, and most libraries do not compile.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_calls_uncompiled(compilation))

        def compile_later(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                stack.enter_context(_calls_uncompiled(compilation))
            return compile_(*args, **kwargs)

        torch.compile = compile_later
        try:
            yield
        finally:
            torch.compile = compile_


@contextmanager
def _calls_uncompiled(compilation: _Compilation) -> Iterator[None]:
    from torch._dynamo import eval_frame

    original = eval_frame._callback_from_stance

    def noticing(callback: Any) -> Any:
        # None and False switch compilation off.
        compilation.seen |= callback is not None and callback is not False
        return original(callback)

    # A function of torch itself, which runs before every call of compiled code.
    eval_frame._callback_from_stance = noticing
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        eval_frame._callback_from_stance = original


def base_problem(cls: type[Any], options: Optimizer) -> list[str]:
    """A line where the class goes around another optimizer that is not given."""
    if not requires_base(cls) or options.base is not None:
        return []
    return [
        f"optimizer.base is missing: {cls.__name__} goes around another optimizer; add "
        "optimizer.base.class_path=torch.optim.SGD optimizer.base.hyperparameters.lr=0.1"
    ]
