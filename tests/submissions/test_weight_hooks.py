"""Hooks, outer Nesterov steps and primal averages around plain gradient descent, against the same written out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Need, OptimizerSubmission, Role, Schedule, Setup, Wrapper
from submissions.lookahead import Lookahead
from submissions.outer_nesterov import EMANesterov, OuterNesterov
from submissions.primal_averaging import PrimalAveraging, ScheduleFree
from submissions.schedule_free import ScheduleFreeSGD
from submissions.spectral import Spectral
from submissions.weight_hooks import (
    CautiousDecay,
    CorrectedDecay,
    Hyperball,
    RadialBrake,
    SpectralSphere,
    UpdateFloor,
    WeightHook,
)
from tests.submissions.parity import (
    ParityContext,
    assert_parity,
    make_parameters,
    make_setup,
    transcription,
)

SHAPES = ((4, 6), (6, 4), (2, 3, 3, 3), (0,))
LR = 0.1
LINEAR = Schedule(shape="linear", warmup_fraction=0, horizon_fraction=1)


class Training:
    """Gradient descent within a wrapper, on the loss of the parity tests."""

    def __init__(
        self, cls: type[Wrapper], parameters: Sequence[nn.Parameter], *, schedule: Schedule | None = None,
        roles: dict[str, Role] | None = None, weight_decay: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        self.parameters = parameters
        named = {f"parameter_{k}": p for k, p in enumerate(parameters)}
        needs = {*cls.needs, Need.PARAMETER_ROLES}
        self.setup = make_setup(named, roles, no_decay={Role.NORM}, needs=needs)
        if schedule is not None:
            self.setup = dataclasses.replace(self.setup, schedule=schedule)
        sgd = torch.optim.SGD(self.setup.decay_groups(), lr=LR, weight_decay=weight_decay)
        self.wrapper = cls(self.setup, OptimizerSubmission(self.setup, [sgd]), **options)
        self.count = itertools.count()

    def step(self) -> None:
        context: Any = ParityContext(self.parameters, next(self.count))
        self.wrapper.step(context)

    def evaluated(self) -> list[Tensor]:
        with self.wrapper.evaluation_weights():
            return [p.detach().clone() for p in self.parameters]


def wrapped(cls: type[Wrapper], **options: Any) -> Callable[[Any], Any]:
    return lambda parameters: Training(cls, parameters, **options)


# ---- hooks of the weights --------------------------------------------------------------------------------------------


def cautious(W: Tensor, g: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    return W - LR * (g + 0.3 * W * (g * W >= 0))


def hyperball(W: Tensor, g: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    R = memory.setdefault("R", W.norm())
    moved = W - LR * R * g / g.norm() if W.numel() else W
    return R * moved / moved.norm() if W.numel() else W


def brake(W: Tensor, g: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    moved = W - LR * g
    grown = moved.norm() - W.norm()
    return moved * ((W.norm() + (0.3 if grown > 0 else 0.8) * grown) / moved.norm()) if W.numel() else W


def floor(W: Tensor, g: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
    return W - LR * g * max(1.0, float(0.5 * W.norm() / g.norm())) if W.numel() else W


# Not in bfloat16: a hook sees the step only after it was rounded to the weight's dtype.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("hook", "options", "equations"),
    [
        (CautiousDecay, {"cautious_decay": 0.3}, cautious),
        (Hyperball, {}, hyperball),
        (RadialBrake, {"brake_outward": 0.3, "brake_inward": 0.8}, brake),
        (UpdateFloor, {"floor_ratio": 0.5}, floor),
    ],
)  # fmt: skip
def test_hooks(
    hook: type[WeightHook], options: dict[str, float], equations: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    assert_parity(wrapped(hook, **options), transcription(equations), dtype, shapes=SHAPES)


def test_a_sphere_keeps_the_spectral_norm() -> None:
    parameters = make_parameters(torch.float64, SHAPES)
    norms = [torch.linalg.matrix_norm(p.detach().flatten(1), 2) for p in parameters[:3]]
    training = Training(SpectralSphere, parameters, sphere_steps=5)
    before = [p.detach().clone() for p in parameters]
    for _ in range(25):
        training.step()
    for p, norm in zip(parameters, norms, strict=False):
        assert float(torch.linalg.matrix_norm(p.detach().flatten(1), 2)) == pytest.approx(float(norm), rel=1e-3)
    assert not torch.equal(parameters[0], before[0])


def test_corrected_decay_falls_with_the_square_of_the_schedule_for_matrices_alone() -> None:
    roles = {"parameter_0": Role.HIDDEN_MATRIX, "parameter_1": Role.EMBEDDING, "parameter_2": Role.NORM}
    parameters = make_parameters(torch.float64, ((4, 6), (6, 4), (5,)))
    training = Training(CorrectedDecay, parameters, schedule=LINEAR, roles=roles, corrected_decay=0.3)
    for step in range(9):
        before = [p.detach().clone() for p in parameters]
        training.step()
        gradients = [p.grad for p in parameters]
        factor = 1 - step / 10
        for p, old, g, decay in zip(parameters, before, gradients, (0.3 * factor, 0.3, 0.0), strict=True):
            assert g is not None
            torch.testing.assert_close(p.detach(), old - LR * factor * (g + decay * old))


def test_a_hook_acts_on_its_roles_and_leaves_alone_what_has_no_gradient() -> None:
    roles = {"parameter_0": Role.HIDDEN_MATRIX, "parameter_1": Role.EMBEDDING, "parameter_2": Role.NORM}
    parameters = make_parameters(torch.float64, ((4, 6), (6, 4), (5,)))
    assert Training(Hyperball, parameters, roles=roles).wrapper.names == ["parameter_0"]  # type: ignore[attr-defined]
    training = Training(CautiousDecay, parameters, roles=roles)
    assert training.wrapper.names == ["parameter_0", "parameter_1"]  # type: ignore[attr-defined]
    before = parameters[0].detach().clone()

    class OneGradient(ParityContext):
        def backward(self) -> Tensor:
            loss = super().backward()
            parameters[0].grad = None
            return loss

    context: Any = OneGradient(parameters, 0)
    training.wrapper.step(context)
    assert torch.equal(parameters[0], before)


def test_a_hook_is_refused_where_it_has_no_meaning() -> None:
    named = {"w": nn.Parameter(torch.zeros(3, 3))}
    setup = make_setup(named, needs={Need.PARAMETER_ROLES})
    spectral = Spectral(setup, weight_decay=0.0)
    with pytest.raises(ValueError, match="Hyperball keeps the norm of `w`, which starts at zero"):
        Hyperball(setup, spectral)
    with pytest.raises(ValueError, match=r"takes the place of weight decay, and Spectral decays `w` by 0\.1; set"):
        CautiousDecay(setup, Spectral(setup, weight_decay=0.1))

    class Bare(OptimizerSubmission):
        def __init__(self, setup: Setup) -> None:
            self.setup, self.optimizers = setup, []

    with pytest.raises(ValueError, match="needs the learning rate of `w`, and Bare has no parameter group"):
        CautiousDecay(setup, Bare(setup))


# ---- Nesterov's momentum on the path ---------------------------------------------------------------------------------


def test_ema_nesterov_starts_its_steps_ahead() -> None:
    """The gradient of each step is that at θ + β m, which a second set of parameters computes."""
    ours, shadow = make_parameters(torch.float64), make_parameters(torch.float64)
    training = Training(EMANesterov, ours, schedule=LINEAR, ahead=0.5, ahead_ema=0.8, ahead_start=0.2, ahead_end=0.7)
    theta = [p.detach().clone() for p in shadow]
    m = [torch.zeros_like(p) for p in theta]
    for step in range(9):
        training.step()
        beta = 0.5 * (1 - step / 10) if 2 <= step < 7 else 0.0
        ahead = [p + beta * d for p, d in zip(theta, m, strict=True)]
        for p, value in zip(shadow, ahead, strict=True):
            p.data = value.clone()
        ParityContext(shadow, step).backward()
        new = [p - LR * (1 - step / 10) * s.grad for p, s in zip(ahead, shadow, strict=True) if s.grad is not None]
        m = [0.8 * d + 0.2 * (after - before) for d, after, before in zip(m, new, theta, strict=True)]
        theta = new
        torch.testing.assert_close([p.detach() for p in ours], theta)


def test_outer_nesterov() -> None:
    ours, inner = make_parameters(torch.float64), make_parameters(torch.float64)
    training = Training(OuterNesterov, ours, outer_lr=0.6, outer_momentum=0.4, outer_every=3)
    slow = [p.detach().clone() for p in inner]
    b = [torch.zeros_like(p) for p in slow]
    for step in range(12):
        training.step()
        ParityContext(inner, step).backward()
        for p in inner:
            assert p.grad is not None
            p.data = p.data - LR * p.grad
        if step % 3 == 2:
            s = [phi - p.detach() for phi, p in zip(slow, inner, strict=True)]
            b = [0.4 * buffer + pseudo for buffer, pseudo in zip(b, s, strict=True)]
            slow = [phi - 0.6 * (0.4 * buffer + pseudo) for phi, buffer, pseudo in zip(slow, b, s, strict=True)]
            for p, phi in zip(inner, slow, strict=True):
                p.data = phi.clone()
        torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in inner])


def test_outer_nesterov_without_momentum_is_lookahead() -> None:
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    outer = Training(OuterNesterov, ours, outer_lr=0.5, outer_momentum=0.0, outer_every=5)
    lookahead = Training(Lookahead, theirs, lookahead_steps=5, lookahead_alpha=0.5)
    for _ in range(20):
        outer.step()
        lookahead.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])


# ---- averages that the gradient is taken near ------------------------------------------------------------------------


def test_primal_averaging() -> None:
    """The three sequences of the paper, each by itself."""
    ours, shadow = make_parameters(torch.float64), make_parameters(torch.float64)
    training = Training(PrimalAveraging, ours, gradient_mix=0.7, averaging_rate=0.1)
    x = [p.detach().clone() for p in shadow]
    z = [p.clone() for p in x]
    for step in range(12):
        training.step()
        for p, average, fast in zip(shadow, x, z, strict=True):
            p.data = 0.7 * average + 0.3 * fast
        ParityContext(shadow, step).backward()
        z = [fast - LR * p.grad for fast, p in zip(z, shadow, strict=True) if p.grad is not None]
        x = [0.9 * average + 0.1 * fast for average, fast in zip(x, z, strict=True)]
        torch.testing.assert_close(training.evaluated(), x)


def test_schedule_free_around_gradient_descent_is_schedule_free_sgd() -> None:
    """With a warm-up, whose small rates weigh less in the average."""
    warm = Schedule(shape="constant", warmup_fraction=0.5, horizon_fraction=1)
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    training = Training(ScheduleFree, ours, schedule=warm, gradient_mix=0.8)
    rule = ScheduleFreeSGD(theirs, lr=LR, momentum=0.8)
    for step in range(12):
        training.step()
        ParityContext(theirs, step).backward()
        for group in rule.param_groups:
            group["lr"] = LR * training.setup.learning_rate_factor(step)
        rule.step()
        torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])
    rule.eval()
    torch.testing.assert_close(training.evaluated(), [p.detach() for p in theirs])
