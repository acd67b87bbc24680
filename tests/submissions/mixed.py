"""A training in closed view: a model with every kind of parameter, a submission, and what the submission was told."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.hyperparameters import accepted
from harness.needs import Need
from harness.roles import Role, parameter_roles
from harness.schedules import Schedule
from harness.seeding import ExampleStream, TrialSeeds
from harness.step import Counters, Evaluator, StepContext
from harness.submission import OptimizerSubmission, Setup, Submission
from harness.workload import Facts
from tests.harness.problem import FACTS, Vectors


class Mixed(nn.Module):
    """Matrices of one shape and of several, convolutions (in channels_last), norms, a scalar, an empty tensor, and a
    matrix that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 16)
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.hidden = nn.Linear(24, 8)
        self.again = nn.Linear(8, 8)
        self.more = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.empty = nn.Parameter(torch.zeros(0))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(-1, 4, 2, 2).to(memory_format=torch.channels_last)
        x = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
        x = torch.tanh(self.hidden(x.flatten(1)))
        x = self.layer_norm(x + self.more(torch.tanh(self.again(x))))
        return self.head(x) * self.scale


class Log:
    """What a submission was given in one step, in float64, by parameter names."""

    def __init__(self) -> None:
        self.loss = torch.tensor(torch.nan)
        self.gradients: dict[str, Tensor] = {}
        self.calls: dict[str, list[Any]] = {}
        self.label_count = 0
        self.batch_size = 0


class Recording(StepContext):
    log: Log

    def _note(self, name: str, value: list[Tensor]) -> list[Tensor]:
        self.log.calls.setdefault(name, []).append([x.detach().double().clone() for x in value])
        return value

    def gradients(self, **options: Any) -> list[Tensor]:
        return self._note("gradients", super().gradients(**options))

    def hessian_vector_product(self, vectors: Any, **options: Any) -> list[Tensor]:
        self._note("vectors", list(vectors))
        return self._note("products", super().hessian_vector_product(vectors, **options))

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        pieces = super().micro_batch_gradients(at_least)
        self.log.calls["pieces"] = [[x.double().clone() for x in piece] for piece in pieces]
        return pieces


class MixedTraining:
    """As harness.training does it, on the model above; `step` returns what the submission was given."""

    def __init__(
        self,
        cls: type[Any],
        hyperparameters: dict[str, Any],
        *,
        no_decay: Iterable[Role] = (),
        clip_norm: float | None = None,
        dtype: torch.dtype = torch.float64,
        needs: frozenset[Need] = frozenset(),
        schedule: Schedule | None = None,
    ) -> None:
        self.workload = Vectors(Facts(**FACTS | {"micro_batch": 16, "nominal_batch": 16}))
        self.workload.load("", torch.device("cpu"))
        self.workload._x = self.workload._x.to(dtype)
        torch.manual_seed(1)
        model = Mixed().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seeds = TrialSeeds(0, 1)
        self.evaluator = Evaluator(self.workload, model, seeds, nullcontext)
        self.stream = ExampleStream(seeds, 64)
        self.generator = torch.Generator().manual_seed(3)
        self.names = {name: p for name, p in model.named_parameters()}
        self.roles = parameter_roles(model, {"head.weight": "head", "stem.weight": "stem"})
        self.needs = needs | getattr(cls, "needs", frozenset())
        setup = Setup(
            self.names, 16, schedule or Schedule(shape="constant", warmup_fraction=0, horizon_fraction=1),
            self.generator, self.generator, clip_norm, frozenset(no_decay), self.needs, self.roles, 40, model,
        )  # fmt: skip
        if issubclass(cls, Submission):
            self.submission = cls(setup, **hyperparameters)
        else:
            decays = "weight_decay" in accepted(cls)
            groups = setup.decay_groups() if decays else [{"params": setup.parameters}]
            self.submission = OptimizerSubmission(setup, [cls(groups, **hyperparameters)])

    def step(self) -> Log:
        counters = self.evaluator.counters
        selection = self.submission.select(self.stream)
        batch = self.workload.batch(*selection)
        ctx = Recording(self.evaluator, batch, counters.examples / 16, self.needs, "test", self.generator)
        ctx.log = Log()
        ctx.log.label_count, ctx.log.batch_size = ctx.label_count, ctx.batch_size
        self.submission.step(ctx)
        counters.update_steps += 1
        counters.examples += len(selection.indices)
        if ctx.first_loss is not None:
            ctx.log.loss = ctx.first_loss.double()
        ctx.log.gradients = {name: p.grad.double() for name, p in self.names.items() if p.grad is not None}
        return ctx.log

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().double().clone() for name, p in self.names.items()}

    def loss(self) -> float:
        """On all data, with the weights that the submission wants evaluated."""
        model = self.evaluator.model.eval()
        with self.submission.evaluation_weights(), torch.no_grad():
            loss = F.cross_entropy(model(self.workload._x).double(), self.workload._y)
        model.train()
        return float(loss)

    def save(self) -> bytes:
        buffer = io.BytesIO()
        state = {
            "model": self.evaluator.model.state_dict(),
            "submission": self.submission.state_dict(),
            "generator": self.generator.get_state(),
            "position": self.stream.position,
            "counters": asdict(self.evaluator.counters),
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.evaluator.model.load_state_dict(state["model"])
        self.submission.load_state_dict(state["submission"])
        self.generator.set_state(state["generator"])
        self.stream.position = state["position"]
        self.evaluator.counters = Counters(**state["counters"])


def decays(training: MixedTraining, weight_decay: float, no_decay: Iterable[Role]) -> dict[str, float]:
    """Weight decay of every parameter."""
    return {name: 0.0 if role in set(no_decay) else weight_decay for name, role in training.roles.items()}


def assert_close(training: MixedTraining, expected: dict[str, Tensor], step: int, tolerance: float = 1e-9) -> None:
    for name, parameter in training.parameters().items():
        assert torch.allclose(parameter, expected[name], rtol=tolerance, atol=tolerance), (name, step)


class AdamW:
    """Loshchilov & Hutter 2019, Algorithm 2, for one parameter in plain float64."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.t = 0

    def direction(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g**2
        m_hat, v_hat = self.m / (1 - self.betas[0] ** self.t), self.v / (1 - self.betas[1] ** self.t)
        return m_hat / (v_hat**0.5 + self.eps)

    def __call__(self, theta: Tensor, g: Tensor, decay: float) -> Tensor:
        return theta - self.lr * decay * theta - self.lr * self.direction(g)
