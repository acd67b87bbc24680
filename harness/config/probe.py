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
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.config import hyperparameters
from harness.config.assembly import assemble
from harness.config.class_source import flags, selecting_keys, signature_names, source_of
from harness.config.probe_problem import Problem, ProblemContext, are_equal, lay_out
from harness.config.schema import FallbackOptimizer, Optimizer, OptimizerPart, Run
from harness.config.undisturbed import undisturbed
from harness.interface.any_optimizer import REST, AnyOptimizer, Assembly, Part, claim_parameters
from harness.interface.needs import Need
from harness.interface.optimizer_signature import filled_arguments, requires_base, requires_closure, takes_model
from harness.interface.roles import Role
from harness.interface.submission import Submission

_SIX_LINES = "write a submission of six lines (docs/any_optimizer.md)"
"""What remains where no option helps."""
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


def _attempt(options: Optimizer, problem: Problem) -> _Attempt:
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


def _with_gradient_where_needed(options: Optimizer, assembly: Assembly, problem: Problem) -> tuple[Assembly, bool]:
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


def _step(submission: AnyOptimizer, problem: Problem, step: int) -> bool:
    """One step; whether a parameter moved within a backward pass."""
    for parameter in submission.setup.parameters:
        parameter.grad = None
    ctx = ProblemContext(submission.setup.parameters, step % problem.max_steps)
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
    return are_equal(first.setup.parameters, second.setup.parameters)


def _examine_on_model(run: Run, cls: type[torch.optim.Optimizer]) -> Examination:
    options, laid_out = run.optimizer, lay_out(run)
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
    problem = Problem(parameters, run.schedule, run.workload["max_steps"], run.workload.get("name", ""))
    return _examine(options, problem, cls)


# ---- what it means -------------------------------------------------------------------------------------------------


def _examine(options: Optimizer, problem: Problem, cls: type[torch.optim.Optimizer]) -> Examination:
    with undisturbed() as compilation:
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


def _explain(error: Exception, options: Optimizer, problem: Problem, cls: type[torch.optim.Optimizer]) -> str:
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
_Remedy = tuple[str, Optimizer, Problem]


def _remedies(options: Optimizer, problem: Problem, cls: type[torch.optim.Optimizer]) -> Iterator[_Remedy]:
    """Options that may help, the likely ones first, alone and then in pairs."""
    singles = list(_single_remedies(options, cls))
    for text, change in singles:
        yield text, *change(options, problem)
    for number, (text, change) in enumerate(singles):
        for other_text, other in singles[number + 1 :]:
            yield f"{text} {other_text}", *other(*change(options, problem))


_Change = Callable[[Optimizer, Problem], tuple[Optimizer, Problem]]


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
        for flag in flags(cls):
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


def _constant(problem: Problem) -> Problem:
    schedule = problem.schedule.model_copy(update={"shape": "constant", "warmup_fraction": 0.0, "table": ()})
    return Problem(problem.parameters, schedule, problem.max_steps, problem.workload)


# ---- what would train as something else ----------------------------------------------------------------------------

_UPDATED_FROM_OUTSIDE = re.compile(r"(update|estimate|refresh)_\w*(hess|curv|fisher|precond)\w*")
_GENERIC_KEYS = {"params", "param_names", "step", "foreach", "fused", "capturable", "differentiable", "maximize"}


def _silent_faults(
    options: Optimizer, problem: Problem, cls: type[torch.optim.Optimizer], attempt: _Attempt
) -> Iterator[str]:
    source = source_of(cls)
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
    unset = selecting_keys(cls, source) - attempt.group_keys - _GENERIC_KEYS - signature_names(cls)
    is_adam = cls.__name__.lower() in ("adam", "adamw") or not hyperparameters.checks_itself(cls)
    if unset and not options.param_groups and not is_adam and _runs_as_adam(options, problem, attempt):
        required = set(re.findall(r"\bgroup\[['\"](\w+)['\"]\]", source)) - attempt.group_keys - _GENERIC_KEYS
        keys = ", ".join(f"{key}: VALUE" for key in [*sorted(unset), *sorted(required - unset)])
        yield (
            f"optimizer.class_path={options.class_path}: no parameter group has {' or '.join(sorted(unset))}, "
            f"without which {cls.__name__} runs as Adam; add "
            f"optimizer.param_groups='{{ROLE: {{{keys}}}, rest: {{}}}}'"
        )


def _runs_as_adam(options: Optimizer, problem: Problem, attempt: _Attempt) -> bool:
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


def base_problem(cls: type[Any], options: Optimizer) -> list[str]:
    """A line where the class goes around another optimizer that is not given."""
    if not requires_base(cls) or options.base is not None:
        return []
    return [
        f"optimizer.base is missing: {cls.__name__} goes around another optimizer; add "
        "optimizer.base.class_path=torch.optim.SGD optimizer.base.hyperparameters.lr=0.1"
    ]
