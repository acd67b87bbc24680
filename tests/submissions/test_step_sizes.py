"""Step-size rules against the libraries of their authors where there are any, and against float64 transcriptions."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import pytest
import torch
from dog import DoG as AuthorsDoG
from dog import LDoG as AuthorsLDoG
from dog import PolynomialDecayAverager
from momo import Momo, MomoAdam
from pytorch_optimizer import SGDSaI as LibrarySGDSaI
from torch import Tensor

from harness.roles import Role
from harness.schedules import Schedule
from submissions.dog import DoG, LDoG
from submissions.momo import MoMo, MoMoAdam
from submissions.polyak import ALRSMAG, PSPS, PSPSHutchinson
from submissions.sgd_sai import SGDSaI
from tests.submissions.mixed import MixedTraining, assert_close, decays

NO_DECAY = (Role.NORM, Role.BIAS)
STEPS = 25


class Library:
    """An optimizer of a library on copies of the parameters that have gradients, fed with a training's gradients."""

    def __init__(self, training: MixedTraining, build: Any) -> None:
        used = [n for n in training.names if n not in ("unused", "empty")]
        self.theta = training.parameters()
        self.parameters = {n: torch.nn.Parameter(self.theta[n].clone()) for n in used}
        self.optimizer = build(list(self.parameters.values()))

    def follow(self, gradients: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        self.optimizer.step(**options)
        return self.theta | {name: p.detach().clone() for name, p in self.parameters.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("cls", "authors"), [(DoG, AuthorsDoG), (LDoG, AuthorsLDoG)])
def test_dog_and_its_average(cls: Any, authors: Any, weight_decay: float) -> None:
    logging.disable(logging.WARNING)
    training = MixedTraining(cls, dict(reps_rel=1e-3, weight_decay=weight_decay))
    library = Library(training, lambda p: authors(p, reps_rel=1e-3, weight_decay=weight_decay))
    averager = PolynomialDecayAverager(training.evaluator.model, gamma=8.0)
    averager._matched_devices = True
    for t in range(STEPS):
        gradients = training.step().gradients
        averager.step()
        expected = library.follow(gradients)
        assert_close(training, expected, t, 1e-8)
    trained = training.evaluator.model.state_dict()
    with training.submission.evaluation_weights():
        for name, value in training.evaluator.model.state_dict().items():
            assert torch.allclose(value.double(), averager.averaged_model.state_dict()[name].double(), atol=1e-9), name
    for name, value in training.evaluator.model.state_dict().items():
        assert torch.equal(value, trained[name])


def test_dog_ignores_the_schedule() -> None:
    falling = Schedule(shape="linear", warmup_fraction=0.5, horizon_fraction=1.0)
    trainings = [MixedTraining(DoG, dict(reps_rel=1e-3), schedule=schedule) for schedule in (falling, None)]
    for _ in range(5):
        for training in trainings:
            training.step()
    assert_close(trainings[0], trainings[1].parameters(), 5, 0.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.05, 10.0])
def test_momo_follows_its_authors(lr: float, weight_decay: float) -> None:
    training = MixedTraining(MoMo, dict(lr=lr, weight_decay=weight_decay))
    library = Library(training, lambda p: Momo(p, lr=lr, weight_decay=weight_decay))
    for t in range(STEPS):
        log = training.step()
        expected = library.follow(log.gradients, loss=log.loss)
        assert_close(training, expected, t, 1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.01, 1.0])
def test_momo_adam_follows_its_authors(lr: float, weight_decay: float) -> None:
    training = MixedTraining(MoMoAdam, dict(lr=lr, weight_decay=weight_decay))
    library = Library(training, lambda p: MomoAdam(p, lr=lr, weight_decay=weight_decay))
    for t in range(STEPS):
        log = training.step()
        expected = library.follow(log.gradients, loss=log.loss)
        assert_close(training, expected, t, 1e-6)  # the library keeps γ in 32 bits


def test_momo_solves_its_proximal_problem_where_groups_differ_in_weight_decay() -> None:
    """The new θ minimises max(model, f*) + ‖y - θ‖²/(2η) + Σ λ_i/2 y_i², which the formula was derived from."""
    lr, beta, weight_decay = 3.0, 0.9, 0.1
    training = MixedTraining(
        MoMo, dict(lr=lr, beta=beta, weight_decay=weight_decay, lower_bound=0.5), no_decay=NO_DECAY
    )
    decay = decays(training, weight_decay, NO_DECAY)
    loss = gamma = None
    d: dict[str, Tensor] = {}
    for _ in range(8):
        before = training.parameters()
        log = training.step()
        g = log.gradients
        inner = sum((g[n] * before[n]).sum() for n in g)
        loss = log.loss if loss is None else beta * loss + (1 - beta) * log.loss
        gamma = inner if gamma is None else beta * gamma + (1 - beta) * inner
        d = {n: beta * d.get(n, g[n]) + (1 - beta) * g[n] for n in g}
        after = training.parameters()

        def objective(y: dict[str, Tensor], before: Any = before, d: Any = d, at: Any = loss - gamma) -> float:
            model = float(at + sum((d[n] * y[n]).sum() for n in d))
            distance = sum(((y[n] - before[n]) ** 2 / (2 * lr) + decay[n] / 2 * y[n] ** 2).sum() for n in d)
            return max(model, 0.5) + float(distance)

        best = objective(after)
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            moved = {n: x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in after.items()}
            assert objective(moved) >= best - 1e-12
        toward = {n: after[n] - 1e-2 * d[n] if n in d else after[n] for n in after}
        assert objective(toward) >= best - 1e-12


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.05, 10.0])
def test_alr_smag(lr: float, weight_decay: float) -> None:
    beta, c, bound = 0.9, 2.0, 0.1
    training = MixedTraining(
        ALRSMAG, dict(lr=lr, beta=beta, c=c, lower_bound=bound, weight_decay=weight_decay), no_decay=NO_DECAY
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    d: Any = defaultdict(float)
    for t in range(STEPS):
        log = training.step()
        for name, g in log.gradients.items():
            d[name] = beta * d[name] + g
        size = min(lr, max(float(log.loss) - bound, 0.0) / (c * sum(float((x**2).sum()) for x in d.values())))
        for name in log.gradients:
            theta[name] = theta[name] - size * (d[name] + decay[name] * theta[name])
        assert_close(training, theta, t, 1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("lr", [0.01, 10.0])
@pytest.mark.parametrize("preconditioner", ["adam", "adagrad", "hutchinson"])
def test_preconditioned_polyak(preconditioner: str, lr: float, weight_decay: float) -> None:
    beta, alpha, c = 0.9, 1e-3, 0.5
    arguments: dict[str, Any] = dict(lr=lr, beta=beta, alpha=alpha, c=c, weight_decay=weight_decay)
    cls: Any = PSPSHutchinson
    if preconditioner != "hutchinson":
        cls, arguments = PSPS, arguments | {"preconditioner": preconditioner}
    training = MixedTraining(cls, arguments, no_decay=NO_DECAY)
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    names, D = list(theta), {}
    for t in range(1, STEPS + 1):
        log = training.step()
        B = {}
        for name, g in log.gradients.items():
            if preconditioner == "adam":
                D[name] = beta * D.get(name, 0) + (1 - beta) * g**2
                estimate = (D[name] / (1 - beta**t)).sqrt()
            elif preconditioner == "adagrad":
                D[name] = D.get(name, 0) + g**2
                estimate = D[name].sqrt()
            else:
                i = names.index(name)
                z = log.calls["vectors"][0][i]
                assert (z.abs() == 1).all()
                new = z * log.calls["products"][0][i]
                estimate = D[name] = new if name not in D else beta * D[name] + (1 - beta) * new
            B[name] = estimate.abs().clamp(min=alpha)
        norm = sum(float((g**2 / B[n]).sum()) for n, g in log.gradients.items())
        size = min(lr, float(log.loss) / (c * norm))
        for name, g in log.gradients.items():
            theta[name] = theta[name] - size * (g / B[name] + decay[name] * theta[name])
        assert_close(training, theta, t, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_sgd_sai_follows_the_library(weight_decay: float) -> None:
    training = MixedTraining(SGDSaI, dict(lr=0.01, weight_decay=weight_decay))
    library = Library(training, lambda p: LibrarySGDSaI(p, lr=0.01, weight_decay=weight_decay))
    for t in range(STEPS):
        expected = library.follow(training.step().gradients)
        assert_close(training, expected, t, 1e-7)


def test_errors_name_key_value_and_fix() -> None:
    with pytest.raises(ValueError, match="preconditioner=hessian: must be adam or adagrad"):
        MixedTraining(PSPS, {"preconditioner": "hessian"})
    with pytest.raises(ValueError, match="reps_rel=0: must be above 0"):
        MixedTraining(DoG, {"reps_rel": 0})
