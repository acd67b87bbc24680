"""Conformance: requirements on every submission, checked on a small problem before any training.

Each check is a function of a `Subject` that returns, or raises CheckFailed with a message that says what to do. The
problem: harness/trial/conformance_problem.py.
"""

from __future__ import annotations

import gc
import io
import math
import types
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import hyperparameters
from harness.config.choices import list_choices
from harness.config.compose import load_run
from harness.config.schema import Run
from harness.errors import CheckFailed
from harness.interface.submission import Setup, Submission, plain_tensors
from harness.trial.conformance_problem import STEPS, TARGET_LOSS, make_problem
from harness.trial.environment import configure_torch, select_device
from harness.trial.training import Training

SHORT_RUN = 12
"""Steps of the checks that compare two runs."""
INTERRUPTED_AFTER = 7
"""The step after which such a run is interrupted: an odd one, in the middle of any period of steps."""


class Subject:
    """A submission on the problem, on a device."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run = run
        self.device = device

    @cached_property
    def short_run(self) -> Training:
        """A run of `SHORT_RUN` steps, with which other runs are compared. Not to be trained any further."""
        return self.train(SHORT_RUN)

    def build(self, dtype: str = "float32") -> Training:
        """A training that is built and not trained. dtype: of the parameters."""
        problem = make_problem(dtype, self.device)
        run = self.run.model_copy(update={"workload": problem.spec.model_dump()})
        training = Training(run, problem, self.device)
        training.build()
        return training

    def train(self, steps: int, dtype: str = "float32", evaluate_after: Sequence[int] = ()) -> Training:
        """A training after `steps` steps. evaluate_after: steps after which evaluation weights are entered and left."""
        training = self.build(dtype)
        for step in evaluate_after:
            train_until(training, step)
            with training.submission.evaluation_weights():
                pass
        train_until(training, steps)
        return training


def train_until(training: Training, steps: int) -> None:
    """Train until `steps` nominal steps are done."""
    training.segment(steps * training.spec.nominal_batch, charge_compile=False)


# ---- the checks ----------------------------------------------------------------------------------------------------


def trains(subject: Subject) -> None:
    """It learns the problem."""
    training = subject.train(STEPS)
    model = training.runner.model
    with training.submission.evaluation_weights(), torch.no_grad():
        model.eval()
        (batch,) = training.workload.evaluation_batches("validation")
        loss = float(training.workload.loss(model(batch["inputs"]), batch))
    # Written so that NaN fails too.
    if not loss <= TARGET_LOSS:
        raise CheckFailed(
            f"its loss after {STEPS} steps with the recipe is {loss:.3f}, above {TARGET_LOSS}; is the rule right, its "
            "sign, the recipe's lr?"
        )


def parameters(subject: Subject) -> None:
    """It moves every parameter that has a gradient, and no other."""
    before = dict(subject.build().runner.model.named_parameters())
    after = dict(subject.short_run.runner.model.named_parameters())
    for name, value in after.items():
        moved = not torch.equal(value, before[name])
        if not value.isfinite().all():
            raise CheckFailed(
                f"`{name}` {tuple(value.shape)} is not finite after {SHORT_RUN} steps; mind divisions by zero and "
                "reductions of empty tensors"
            )
        if name in ("unused", "frozen") and moved:
            raise CheckFailed(f"`{name}` has no gradient and was changed; skip parameters whose .grad is None")
        if name not in ("unused", "frozen", "empty") and not moved:
            raise CheckFailed(
                f"`{name}` {tuple(value.shape)} has a gradient and never moved; update every parameter of every group"
            )


def bfloat16(subject: Subject) -> None:
    """It trains bfloat16 parameters, and resumes them to the bit."""
    uninterrupted = subject.train(SHORT_RUN, "bfloat16")
    for name, value in uninterrupted.runner.model.named_parameters():
        if value.dtype != torch.bfloat16 or not value.isfinite().all():
            raise CheckFailed(
                f"`{name}` is {value.dtype} with non-finite values or of another type after {SHORT_RUN} steps from "
                "bfloat16; compute in float32 and round once (submissions.rule does)"
            )
    _check_same_bits(
        uninterrupted,
        _train_interrupted(subject, "bfloat16"),
        "bfloat16 parameters are not resumed to the bit; keep the dtype of the state where it is loaded",
    )


def deterministic(subject: Subject) -> None:
    """Two runs with one seed are the same to the bit."""
    _check_same_bits(
        subject.short_run,
        subject.train(SHORT_RUN),
        "two runs with one seed differ; draw random numbers from setup.generator only",
    )


def resumes(subject: Subject) -> None:
    """Interrupted and resumed it ends with the same bits."""
    _check_same_bits(
        subject.short_run,
        _train_interrupted(subject),
        f"stopped after step {INTERRUPTED_AFTER} and resumed, it ends elsewhere; put all that changes between steps "
        "into state_dict",
    )


def evaluates(subject: Subject) -> None:
    """An evaluation leaves no trace in the training."""
    training = subject.train(INTERRUPTED_AFTER, evaluate_after=(3,))
    before = _bits(training)
    with training.submission.evaluation_weights():
        pass
    # Also checked at once: a trace may vanish in the steps that follow.
    if _bits(training) != before:
        raise CheckFailed("the weights after an evaluation are not those before it; see harness.interface.swapped")
    train_until(training, SHORT_RUN)
    _check_same_bits(
        subject.short_run,
        training,
        "it ends elsewhere when it is evaluated more often; evaluation_weights must leave no trace "
        "(harness.interface.swapped)",
    )


def counts_state(subject: Subject) -> None:
    """It reports every byte that it holds between steps, and no more."""
    training = subject.short_run
    runner = training.runner
    of_the_model = {_address(p) for p in runner.model.parameters()} | {_address(b) for b in runner.model.buffers()}
    # Gradients belong to the harness; `frees` checks that a submission lets go of them.
    of_the_model |= {_address(p.grad) for p in runner.parameters if p.grad is not None}
    held = {
        _address(tensor): tensor.untyped_storage().nbytes()
        for tensor in _reachable_tensors(training.submission)
        if _address(tensor) not in of_the_model
    }
    # Tensors without elements.
    held.pop(0, None)
    reported = training.submission.state_bytes()
    if reported != sum(held.values()):
        raise CheckFailed(
            f"it reports {reported} bytes of state and holds {sum(held.values())}; let state_tensors() return every "
            "tensor kept between steps, and keep none that is not needed"
        )


def frees(subject: Subject) -> None:
    """It lets go of gradients after a step, and of the model at the end."""
    training = subject.train(3)
    gradients = [weakref.ref(p.grad) for p in training.runner.parameters if p.grad is not None]
    for parameter in training.runner.parameters:
        parameter.grad = None
    if any(gradient() is not None for gradient in gradients):
        raise CheckFailed("it holds on to gradients after its step; copy what the next step needs, drop the rest")
    model = weakref.ref(training.runner.model)
    weights = [weakref.ref(p) for p in training.runner.parameters]
    # `parameter` still refers to the last parameter of the loop above.
    del training, parameter
    if model() is not None:
        # It may be part of a cycle, which is allowed. Collecting takes as long as many steps.
        gc.collect()
    if model() is not None or any(weight() is not None for weight in weights):
        raise CheckFailed("the model outlives the submission; keep no references in globals, caches or hooks")


def refuses(subject: Subject) -> None:
    """It refuses hyperparameters that it does not have, and values out of range."""
    options = subject.run.optimizer
    values, path, wrappers = options.effective_hyperparameters, options.class_path, options.wrappers
    classes: list[type[Any]] = [hyperparameters.import_algorithm(path), *map(hyperparameters.import_wrapper, wrappers)]

    def expect_refusal(name: str, value: Any) -> None:
        if not hyperparameters.check_hyperparameters(path, values | {name: value}, wrappers):
            raise CheckFailed(
                f"{name}={value} is accepted; annotate its range in the signature, for example with "
                "pydantic.PositiveFloat"
            )

    if not any(map(hyperparameters.is_open, classes)):
        expect_refusal("no_such_hyperparameter", 1)
    # An optimizer of another library decides itself what it refuses.
    signatures = (hyperparameters.signature_hyperparameters(c) for c in classes if not hyperparameters.checks_itself(c))
    for name, parameter in (item for signature in signatures for item in signature.items()):
        default = values.get(name, parameter.default)
        # bool is a subclass of int.
        if isinstance(default, bool) or not isinstance(default, int | float | list | tuple):
            continue
        # NaN is in no range; -1 is only wrong where a range is annotated.
        bad_values = (math.nan, -1.0) if hyperparameters.range_name(name) else (math.nan,)
        for value in bad_values:
            expect_refusal(name, [value] * len(default) if isinstance(default, list | tuple) else value)


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (trains, parameters, bfloat16, deterministic, resumes, evaluates, counts_state, frees, refuses)
}
"""All checks by name."""


def make_subject(name: str, *arguments: str) -> Subject:
    """The submission of configs/optimizer/<name>.yaml, on the device of `run.device`; `arguments` as for run.py."""
    # Any workload makes a configuration complete; Subject.build replaces it.
    run = load_run([f"workload={list_choices('workload')[0]}", f"optimizer={name}", *arguments])
    device = select_device(run)
    configure_torch(run, device)
    return Subject(run, device)


def run_checks(subject: Subject) -> dict[str, str]:
    """Run all checks; the messages of those that failed, by name. An exception is a failure too."""
    failures = {}
    for name, check in CHECKS.items():
        try:
            check(subject)
        except CheckFailed as failed:
            failures[name] = str(failed)
        # A submission under test may raise anything, and the other checks must still run.
        except Exception as error:
            failures[name] = f"it raised {type(error).__name__}: {error}"
    return failures


# ---- how the checks compare ----------------------------------------------------------------------------------------


def _train_interrupted(subject: Subject, dtype: str = "float32") -> Training:
    """As `Subject.train(SHORT_RUN)`, but saved after some steps, and loaded into a new training."""
    # Through bytes, as a real checkpoint: shared memory would hide state that state_dict forgets.
    buffer = io.BytesIO()
    torch.save(subject.train(INTERRUPTED_AFTER, dtype).state_dict(), buffer)
    buffer.seek(0)
    training = subject.build(dtype)
    training.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))
    train_until(training, SHORT_RUN)
    return training


def _bits(training: Training) -> dict[str, bytes]:
    # Bytes, since torch.equal takes NaN for different from itself and -0.0 for equal to 0.0.
    return {
        name: value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in training.runner.model.state_dict().items()
    }


def _check_same_bits(expected: Training, actual: Training, message: str) -> None:
    first, second = _bits(expected), _bits(actual)
    differing = [name for name in first if first[name] != second[name]]
    if differing:
        raise CheckFailed(f"{message} (first in `{differing[0]}`)")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reachable_tensors(submission: Submission) -> list[Tensor]:
    """Every tensor that can be reached from the submission, except through objects of the harness."""
    # A stack and `seen`, since objects refer to each other in cycles.
    tensors, seen, pending = [], set(), [submission]
    while pending:
        value: Any = pending.pop()
        if id(value) in seen or isinstance(value, Setup | nn.Module | type | types.ModuleType | torch.Generator):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors += plain_tensors(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        elif isinstance(value, types.FunctionType):
            pending += [cell.cell_contents for cell in value.__closure__ or ()]
        else:
            pending += getattr(value, "__dict__", {}).values()
            # Objects may keep attributes in __dict__, in the __slots__ of any base class, or in both.
            slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            pending += [getattr(value, name) for name in slots if hasattr(value, name)]
    return tensors
