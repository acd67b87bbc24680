"""Schedules that treat hidden matrices and the other parameters apart, and those of the weight decay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from harness.interface import OptimizerSubmission, Role, Schedule, Setup
from submissions.muon import Muon
from tests.submissions.parity import ParityContext, make_setup

APART = Schedule(
    shape="wsd", warmup_fraction=0, horizon_fraction=1, decay_fraction=0.4, rest_decay_fraction=0.8,
    scale_weight_decay=True,
)  # fmt: skip
ROLES = {"matrix": Role.HIDDEN_MATRIX, "head": Role.HEAD, "norm": Role.NORM}


def setup(schedule: Schedule) -> tuple[Setup, list[nn.Parameter]]:
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in
             {"matrix": (3, 4), "head": (4, 3), "norm": (3,)}.items()}  # fmt: skip
    made = make_setup(named, ROLES, no_decay={Role.NORM}, needs=Muon.needs)
    return dataclasses.replace(made, schedule=schedule), list(named.values())


def test_matrices_and_the_rest_follow_schedules_of_their_own() -> None:
    made, parameters = setup(APART)
    sgd = torch.optim.SGD(made.decay_groups(), lr=1.0, weight_decay=0.5)
    submission = OptimizerSubmission(made, [sgd])
    context: Any = ParityContext(parameters, 8)
    submission.step(context)
    # Of ten steps: 8 is halfway through the last four, and three quarters through the last eight.
    values = {tuple(g["params"][0].shape): (g["lr"], g["weight_decay"]) for g in sgd.param_groups}
    assert values[3, 4] == pytest.approx((0.5, 0.25))
    assert values[4, 3] == pytest.approx((0.25, 0.125))
    assert values[(3,)] == pytest.approx((0.25, 0.0))


def test_a_rule_for_matrices_holds_views_of_them() -> None:
    made, parameters = setup(APART)
    muon = Muon(made, lr=1.0, adamw_lr=1.0)
    context: Any = ParityContext(parameters, 8)
    muon.step(context)
    assert [[g["lr"] for g in optimizer.param_groups] for optimizer in muon.optimizers] == [
        [pytest.approx(0.5)], [pytest.approx(0.25), pytest.approx(0.25)],
    ]  # fmt: skip


def test_a_group_of_both_is_refused() -> None:
    made, parameters = setup(APART)
    with pytest.raises(ValueError, match=r"schedule\.rest_decay_fraction=0\.8: a parameter group has hidden matrices"):
        OptimizerSubmission(made, [torch.optim.SGD(parameters, lr=1.0)])


def test_without_the_option_groups_are_as_ever() -> None:
    made, _ = setup(Schedule(shape="linear", warmup_fraction=0, horizon_fraction=1))
    assert [len(group["params"]) for group in made.decay_groups()] == [2, 1]
