"""Conformance: what every submission must do, whatever it is, checked on a small problem before any training.

The problem's model has what real models have and update rules forget: a scalar, an empty and a non-contiguous
parameter, one without gradient, a frozen one, a convolution, an embedding, BatchNorm statistics. A failed check
says what to do.
"""

from __future__ import annotations

import gc
import io
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from harness import hyperparameters
from harness.choices import choices
from harness.config import Run, load
from harness.environment import configure_torch
from harness.submission import Setup, Submission
from harness.training import Training
from harness.workload import Batch, Facts, Split, Workload

STEPS = 80
"""Budget of the problem."""
GOAL = 0.9
"""Training loss to reach within it; it starts near log 3 = 1.1."""
SHORT = 12
"""Steps of the other checks, cut at an odd place."""
CUT = 7


class Failed(Exception):
    """A check that failed; the message says what to do."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    dtype: Literal["float32", "bfloat16"] = "float32"


class _Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.transposed = nn.Parameter((torch.randn(4, 8) / 8**0.5).t())
        self.head = nn.Linear(4, 3)
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.batch_norm(self.convolution(self.embedding(tokens).transpose(1, 2))).mean(2)
        x = torch.tanh(self.hidden(self.norm(x) * self.frozen)) @ self.transposed
        return self.head(x) * self.scalar + self.empty.sum()


class Problem(Workload):
    """Sequences of four tokens in three classes, by their sum."""

    Model = _Options
    Data = _Nothing

    def load(self, source: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randint(6, (256, 4), generator=generator)
        total = self._x.sum(1)
        self._y = (total > 8) * 1 + (total > 11) * 1

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}

    @property
    def train_size(self) -> int:
        return len(self._x)

    def build_model(self) -> nn.Module:
        return _Model().to(getattr(torch, self.model_options.dtype))

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        return {"inputs": self._x[indices], "labels": self._y[indices]}

    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(outputs.float().softmax(-1), 1, generator=generator).squeeze(1)

    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        yield from [{"inputs": self._x, "labels": self._y}][part]

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss(outputs, batch, "none").sum(), "num_examples": torch.tensor(len(batch["labels"]))}


class Subject:
    """A submission on the problem."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def short(self) -> Training:
        """What the other runs are compared with. Not to be trained any further."""
        return self.trained(SHORT)

    def training(self, dtype: str = "float32") -> Training:
        facts: dict[str, Any] = dict(
            name="conformance", description="", class_path="harness.conformance.Problem", version=1, metric="loss",
            direction="min", target=GOAL, target_version=1, nominal_batch=32, micro_batch=16, max_steps=STEPS,
            eval_every=1, max_seconds=60.0, model={"dtype": dtype}, data={},
        )  # fmt: skip
        workload = Problem(Facts(**facts))
        workload.load("", torch.device("cpu"))
        training = Training(self.run.model_copy(update={"workload": facts}), workload, torch.device("cpu"))
        training.build()
        return training

    def trained(self, steps: int, dtype: str = "float32", look: Sequence[int] = ()) -> Training:
        """After `steps` steps, with the evaluation weights looked at after the steps in `look`."""
        training = self.training(dtype)
        for step in look:
            advance(training, step)
            with training.submission.evaluation_weights():
                pass
        advance(training, steps)
        return training


def advance(training: Training, steps: int) -> None:
    training.segment(steps * training.facts.nominal_batch, charge_compile=False)


# ---- the checks: each returns, or raises Failed -------------------------------------------------------------------


def trains(subject: Subject) -> None:
    training = subject.trained(STEPS)
    with training.submission.evaluation_weights(), torch.no_grad():
        training.evaluator.model.eval()
        (batch,) = training.workload.evaluation_batches("validation")
        found = float(training.workload.loss(training.evaluator.model(batch["inputs"]), batch))
    if not found <= GOAL:
        raise Failed(f"its loss after {STEPS} steps with the recipe is {found:.3f}, above {GOAL}; is the rule right, "
                     "its sign, the recipe's lr?")  # fmt: skip


def parameters(subject: Subject) -> None:
    before = dict(subject.training().evaluator.model.named_parameters())
    after = dict(subject.short.evaluator.model.named_parameters())
    for name, value in after.items():
        moved = not torch.equal(value, before[name])
        if not value.isfinite().all():
            raise Failed(f"`{name}` {tuple(value.shape)} is not finite after {SHORT} steps; mind divisions by zero "
                         "and reductions of empty tensors")  # fmt: skip
        if name in ("unused", "frozen") and moved:
            raise Failed(f"`{name}` has no gradient and was changed; skip parameters whose .grad is None")
        if name not in ("unused", "frozen", "empty") and not moved:
            raise Failed(f"`{name}` {tuple(value.shape)} has a gradient and never moved; update every parameter of "
                         "every group")  # fmt: skip


def bfloat16(subject: Subject) -> None:
    whole = subject.trained(SHORT, "bfloat16")
    for name, value in whole.evaluator.model.named_parameters():
        if value.dtype != torch.bfloat16 or not value.isfinite().all():
            raise Failed(f"`{name}` is {value.dtype} with non-finite values or of another type after {SHORT} steps "
                         "from bfloat16; compute in float32 and round once (submissions.rule does)")  # fmt: skip
    _same(whole, _resumed(subject, "bfloat16"), "bfloat16 parameters are not resumed to the bit; keep "
          "the dtype of the state where it is loaded")  # fmt: skip


def deterministic(subject: Subject) -> None:
    _same(subject.short, subject.trained(SHORT),
          "two runs with one seed differ; draw random numbers from setup.generator only")  # fmt: skip


def resumes(subject: Subject) -> None:
    _same(subject.short, _resumed(subject),
          f"stopped after step {CUT} and resumed, it ends elsewhere; put all that changes between steps into "
          "state_dict")  # fmt: skip


def evaluates(subject: Subject) -> None:
    looked = subject.training()
    advance(looked, CUT)
    before = _bits(looked)
    with looked.submission.evaluation_weights():
        pass
    if _bits(looked) != before:
        raise Failed("the weights after an evaluation are not those before it; see harness.step.swapped")
    _same(subject.short, subject.trained(SHORT, look=(3, CUT)),
          "it ends elsewhere when it is evaluated more often; evaluation_weights must leave no trace "
          "(harness.step.swapped)")  # fmt: skip


def counts_state(subject: Subject) -> None:
    training = subject.short
    own = {_pointer(p) for p in training.evaluator.model.parameters()}
    own |= {_pointer(b) for b in training.evaluator.model.buffers()}
    own |= {_pointer(p.grad) for p in training.evaluator.parameters if p.grad is not None}
    held = {_pointer(t): t.untyped_storage().nbytes() for t in _held(training.submission) if _pointer(t) not in own}
    held.pop(0, None)
    reported = training.submission.state_bytes()
    if reported != sum(held.values()):
        raise Failed(f"it reports {reported} bytes of state and holds {sum(held.values())}; let state_tensors() return "
                     "every tensor kept between steps, and keep none that is not needed")  # fmt: skip


def frees(subject: Subject) -> None:
    training = subject.trained(3)
    gradients = [weakref.ref(p.grad) for p in training.evaluator.parameters if p.grad is not None]
    for parameter in training.evaluator.parameters:
        parameter.grad = None
    if any(gradient() is not None for gradient in gradients):
        raise Failed("it holds on to gradients after its step; copy what the next step needs, drop the rest")
    model = weakref.ref(training.evaluator.model)
    weights = [weakref.ref(p) for p in training.evaluator.parameters]
    del training, parameter
    gc.collect()
    if model() is not None or any(weight() is not None for weight in weights):
        raise Failed("the model outlives the submission; keep no references in globals, caches or hooks")


def refuses(subject: Subject) -> None:
    options = subject.run.optimizer
    values, path, wrappers = options.effective_hyperparameters, options.class_path, options.wrappers
    classes: list[type[Any]] = [hyperparameters.algorithm_class(path), *map(hyperparameters.wrapper_class, wrappers)]

    def expect(name: str, value: Any) -> None:
        if not hyperparameters.check(path, values | {name: value}, wrappers):
            raise Failed(f"{name}={value} is accepted; annotate its range in the signature, for example with "
                         "pydantic.PositiveFloat")  # fmt: skip

    expect("no_such_hyperparameter", 1)
    for name, parameter in (item for cls in classes for item in hyperparameters.accepted(cls).items()):
        default = values.get(name, parameter.default)
        if isinstance(default, bool) or not isinstance(default, int | float | list | tuple):
            continue
        spoilt = (math.nan, -1.0) if hyperparameters.kind(name) else (math.nan,)
        for value in spoilt:
            expect(name, [value] * len(default) if isinstance(default, list | tuple) else value)


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (trains, parameters, bfloat16, deterministic, resumes, evaluates, counts_state, frees, refuses)
}


def subject(name: str, *arguments: str) -> Subject:
    """The submission of configs/optimizer/<name>.yaml; `arguments` as for run.py."""
    run = load([f"workload={choices('workload')[0]}", f"optimizer={name}", *arguments])
    configure_torch(run, torch.device("cpu"))
    return Subject(run)


def failures(subject: Subject) -> dict[str, str]:
    """What is wrong, by check; a crash is a failure too."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check(subject)
        except Failed as failed:
            found[name] = str(failed)
        except Exception as error:
            found[name] = f"it raised {type(error).__name__}: {error}"
    return found


def _resumed(subject: Subject, dtype: str = "float32") -> Training:
    buffer = io.BytesIO()
    torch.save(subject.trained(CUT, dtype).state_dict(), buffer)
    buffer.seek(0)
    training = subject.training(dtype)
    training.load_state_dict(torch.load(buffer, weights_only=True))
    advance(training, SHORT)
    return training


def _bits(training: Training) -> dict[str, bytes]:
    model = training.evaluator.model
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def _same(one: Training, other: Training, otherwise: str) -> None:
    first, second = _bits(one), _bits(other)
    differing = [name for name in first if first[name] != second[name]]
    if differing:
        raise Failed(f"{otherwise} (first in `{differing[0]}`)")


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held(root: Submission) -> list[Tensor]:
    """Every tensor that can be reached from the submission, but for what the harness handed it."""
    found, seen, todo = [], set(), [root]
    while todo:
        value: Any = todo.pop()
        if id(value) in seen or isinstance(value, Setup | nn.Module | type | types.ModuleType | torch.Generator):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, types.FunctionType):
            todo += [cell.cell_contents for cell in value.__closure__ or ()]
        else:
            todo += getattr(value, "__dict__", {}).values()
            slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            todo += [getattr(value, name) for name in slots if hasattr(value, name)]
    return found
