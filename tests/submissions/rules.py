"""The elementwise rules of the repository, and training of a few parameters with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from submissions.accelerated_sgd import AcceleratedSGD
from submissions.adabelief import AdaBelief
from submissions.adabound import AdaBound
from submissions.adan import Adan
from submissions.ademamix import AdEMAMixRule
from submissions.adopt import Adopt
from submissions.complex_momentum import ComplexMomentum
from submissions.diffgrad import DiffGrad
from submissions.grams import Grams
from submissions.lion import Lion
from submissions.random_scaling import RandomScalingRule
from submissions.rule import Rule
from submissions.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from submissions.sgd_sai import SGDSaI
from submissions.sgdw import SGDW
from submissions.sophia import SophiaRule

MakeRule = Callable[[Sequence[nn.Parameter]], Rule]
SOPHIA = {"lr": 0.1, "betas": (0.9, 0.99), "gamma": 0.1, "eps": 1e-12, "weight_decay": 0.1}
ELEMENTWISE: dict[str, MakeRule] = {
    "AcceleratedSGD": lambda p: AcceleratedSGD(p, weight_decay=0.1),
    "AdaBelief": lambda p: AdaBelief(p, weight_decay=0.1),
    "AdaBound": lambda p: AdaBound(p, weight_decay=0.1, amsbound=True),
    "Adan": lambda p: Adan(p),
    "AdEMAMix": lambda p: AdEMAMixRule(p, 1e-3, (0.9, 0.99, 0.999), 5.0, 1e-8, 0.1, 10),
    "Adopt": lambda p: Adopt(p, weight_decay=0.1),
    "ComplexMomentum": lambda p: ComplexMomentum(p, weight_decay=0.1),
    "DiffGrad": lambda p: DiffGrad(p, weight_decay=0.1),
    "Grams": lambda p: Grams(p, weight_decay=0.1),
    "Lion": lambda p: Lion(p, weight_decay=0.1),
    "RandomScaling": lambda p: RandomScalingRule(p, 0.1, 0.9, 0.1, torch.Generator().manual_seed(0)),
    "ScheduleFreeAdamW": lambda p: ScheduleFreeAdamW(p, weight_decay=0.1),
    "ScheduleFreeSGD": lambda p: ScheduleFreeSGD(p, weight_decay=0.1),
    "SGDSaI": lambda p: SGDSaI(p),
    "SGDW": lambda p: SGDW(p, weight_decay=0.1),
    "Sophia": lambda p: SophiaRule(p, SOPHIA),
}


def train(make: MakeRule, parameters: list[nn.Parameter], steps: int = 4, lr_decay: float = 0.9) -> Rule:
    """The rule after some steps of a falling learning rate on gradients that are the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    rule: Any = make(parameters)
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
            if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last):
                p.grad = p.grad.contiguous(memory_format=torch.channels_last)
        if isinstance(rule, SophiaRule):
            # In rows, also for the channels_last parameter.
            squares = {p: p.detach().square().contiguous() for p in parameters}
            rule.estimates = squares if step % 2 else None
        rule.step()
        for group in rule.param_groups:
            group["lr"] *= lr_decay
    assert isinstance(rule, Rule)
    return rule


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Three that are large for a block of 100 elements, one of them channels_last, and three small ones."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 60), (3, 7, 4, 4), (129,), (8,), (3, 2), ())
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def results(rule: Rule, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters and all state tensors."""
    states = [rule.state[p] for p in parameters]
    state_tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [*(p.detach() for p in parameters), *state_tensors]
