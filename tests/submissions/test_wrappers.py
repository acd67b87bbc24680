"""Wrappers around plain SGD, against the same training written out."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from harness.errors import UserError
from harness.interface import Need
from harness.trial import conformance
from harness.trial.batch_norm import batch_norm_statistics
from harness.trial.conformance import train_until
from harness.trial.training import Training
from tests.harness.problem import Net, make

STEPS = 11


def start_training(wrapper: str | None = None, **hyperparameters: float) -> Training:
    arguments = ["optimizer.class_path=torch.optim.SGD", "optimizer.hyperparameters.lr=0.3"]
    arguments += [f"optimizer.hyperparameters.{name}={value}" for name, value in hyperparameters.items()]
    if wrapper is not None:
        arguments.append(f"optimizer.wrappers=[submissions.{wrapper}]")
    return conformance.make_subject("any", *arguments).build()


def weights(training: Training) -> list[Tensor]:
    return [p.detach().double().clone() for p in training.runner.parameters]


def evaluated(training: Training) -> list[Tensor]:
    with training.submission.evaluation_weights():
        return weights(training)


def test_lookahead() -> None:
    wrapped, plain = start_training("lookahead.Lookahead", lookahead_steps=3, lookahead_alpha=0.4), start_training()
    slow = weights(plain)
    for step in range(1, STEPS + 1):
        train_until(wrapped, step)
        train_until(plain, step)
        if step % 3 == 0:
            slow = [phi + 0.4 * (p - phi) for phi, p in zip(slow, weights(plain), strict=True)]
            for p, phi in zip(plain.runner.parameters, slow, strict=True):
                p.data.copy_(phi)
        torch.testing.assert_close(weights(wrapped), weights(plain), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(evaluated(wrapped), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrapper", "options", "coefficients"),
    [
        # The weights of the iterates 1 to 11 in the average after 11 steps, in closed form.
        ("ExponentialAverage", {"ema_decay": 0.8, "ema_power": 0.0}, [0.0] * 10 + [1.0]),
        ("ExponentialAverage", {"ema_decay": 0.8, "ema_power": 1.0}, [0.2 * 0.8 ** max(11 - k, 0) if k > 5 else
                                                                     0.2 * 0.8**6 for k in range(1, 12)]),
        ("PolynomialAverage", {"average_gamma": 0.0}, [1 / 11] * 11),
        ("PolynomialAverage", {"average_gamma": 1.0}, [2 * k / (11 * 12) for k in range(1, 12)]),
        ("TailAverage", {"swa_start": 0.05, "swa_every": 3}, [0.0] * 6 + [0.5, 0, 0, 0.5, 0]),
        ("TailAverage", {"swa_start": 0.5}, [0.0] * 10 + [1.0]),
    ],
)  # fmt: skip
def test_averages(wrapper: str, options: dict[str, float], coefficients: list[float]) -> None:
    """swa_start=0.05 of the problem's 80 steps is 4."""
    wrapped, plain = start_training(f"averaging.{wrapper}", **options), start_training()
    mean = [torch.zeros_like(p) for p in weights(plain)]
    for step, coefficient in enumerate(coefficients, 1):
        train_until(wrapped, step)
        train_until(plain, step)
        mean = [m + coefficient * p for m, p in zip(mean, weights(plain), strict=True)]
    assert sum(coefficients) == pytest.approx(1)
    torch.testing.assert_close(evaluated(wrapped), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(wrapped), weights(plain), rtol=0, atol=0)


def test_a_tail_average_recomputes_batch_norm_statistics_for_evaluations_only() -> None:
    statistics = {}
    for recalibration in (0, 2):
        training = start_training("averaging.TailAverage", swa_start=0.05, swa_recalibration=recalibration)
        model, forwards = training.runner.model, training.runner.counters
        for steps, recomputed in ((3, False), (STEPS, True)):
            train_until(training, steps)
            trained, before = [s.clone() for s in batch_norm_statistics(model)], forwards.forward_examples
            with training.submission.evaluation_weights():
                statistics[recalibration] = [s.clone() for s in batch_norm_statistics(model)]
            assert all(torch.equal(a, b) for a, b in zip(batch_norm_statistics(model), trained, strict=True))
            assert forwards.forward_examples - before == 32 * recalibration * recomputed
    assert not any(torch.equal(a, b) for a, b in zip(statistics[0], statistics[2], strict=True))


def test_sam_computes_the_gradient_at_perturbed_weights() -> None:
    from submissions.sam import _PerturbedContext

    runner, ctx = make(Need.RE_EVALUATE, model=Net(0.0, norm=False))
    initial = [p.detach().clone() for p in runner.parameters]
    gradients = ctx.gradients()
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    expected = ctx.gradients(params=[p + 0.3 / norm * g for p, g in zip(initial, gradients, strict=True)])
    loss = _PerturbedContext(ctx, 0.3).backward()
    torch.testing.assert_close([p.grad for p in runner.parameters], expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(runner.parameters, initial, strict=True))
    torch.testing.assert_close(loss, ctx.loss_and_gradients()[0])


def test_coordinate_clipping_bounds_the_largest_share() -> None:
    from submissions.coordinate_clipping import _ClippedContext

    runner, ctx = make(Need.RE_EVALUATE, model=Net(0.0, norm=False))
    plain = ctx.gradients()
    _ClippedContext(ctx, 0.2).backward()
    for p, g in zip(runner.parameters, plain, strict=True):
        bound = g.abs().flatten().sort().values[round(0.8 * g.numel()) - 1]
        torch.testing.assert_close(p.grad, g.clip(-bound, bound))


def test_a_wrapper_around_another_submission_shares_its_hyperparameters() -> None:
    lookahead = "submissions.lookahead.Lookahead"
    around = f"optimizer.wrappers=[{lookahead}]"
    training = conformance.make_subject("muon", around, "optimizer.hyperparameters.lookahead_steps=2").build()
    train_until(training, 3)
    assert type(training.submission).__name__ == "Lookahead"
    for arguments, message in [
        (
            [around, "optimizer.hyperparameters.lookahead_step=2"],
            "Muon within Lookahead has no such",
        ),
        (["optimizer.wrappers=[torch.optim.SGD]"], "not a harness.interface.Wrapper"),
        ([f"optimizer.wrappers=[{lookahead},{lookahead}]"], "share the hyperparameter lookahead_steps"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            conformance.make_subject("muon", *arguments)
