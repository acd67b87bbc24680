"""The common base of update rules, tested with Lion where one rule is enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from submissions.accelerated_sgd import AcceleratedSGD
from submissions.adabelief import AdaBelief
from submissions.adabound import AdaBound
from submissions.adan import Adan
from submissions.ademamix import AdEMAMixRule
from submissions.adopt import Adopt
from submissions.cautious import CautiousLion
from submissions.complex_momentum import ComplexMomentum
from submissions.diffgrad import DiffGrad
from submissions.grams import Grams
from submissions.lamb import Lamb
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
elementwise_rules = pytest.mark.parametrize("name", ELEMENTWISE)


def test_parameters_without_gradient_are_skipped_and_closures_called() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([used, unused], lr=0.1)

    def closure() -> Tensor:
        loss = used.sum()
        used.grad = torch.ones(2)
        return loss

    assert optimizer.step(closure) == 2
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    assert torch.allclose(used.detach(), torch.full((2,), 0.9))


def test_each_parameter_counts_its_own_steps() -> None:
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([early, late], lr=0.1)
    for step in range(3):
        early.grad, late.grad = torch.ones(2), torch.ones(2) if step == 2 else None
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in (early, late)] == [3, 1]


def test_narrow_parameters_are_rounded_once_and_their_state_is_float32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Lion([parameter], lr=0.01)
    parameter.grad = torch.tensor([0.1, -0.2, 0.3], dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[parameter]["momentum"].dtype == torch.float32
    assert torch.equal(parameter.detach(), torch.tensor([0.99, 1.01, 0.99]).bfloat16())


def test_sparse_gradients_are_refused_with_the_remedy() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        Lion(embedding.parameters()).step()


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(block: float) -> tuple[list[Tensor], list[int]]:
        monkeypatch.setattr(Lion, "block", block)
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 5, 0, 40, 2, 7)]
        optimizer = Lion(parameters, lr=0.1, weight_decay=0.1)
        sizes = []
        for step in range(3):
            for index, p in enumerate(parameters):
                p.grad = None if index == step else torch.randn(p.shape, generator=generator)
            sizes.append(len(optimizer._buckets(optimizer.param_groups[0])))
            optimizer.step()
        return [p.detach() for p in parameters], sizes

    unblocked, few = trained(float("inf"))
    blocked, many = trained(8)
    assert max(few) < max(many)
    assert all(torch.equal(a, b) for a, b in zip(unblocked, blocked, strict=True))


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


@elementwise_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_large_parameters_change_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for block in (float("inf"), 250, 100, 64, 1):
        monkeypatch.setattr(Rule, "block", block)
        parameters = make_parameters(dtype)
        rule = train(ELEMENTWISE[name], parameters)
        trained.append(results(rule, parameters))
        largest = max(theta.numel() for bucket in rule._buckets(rule.param_groups[0]) for theta in bucket.theta)
        assert largest == (336 if block == float("inf") else max(64, block // 64 * 64))
    for other in trained[1:]:
        assert all(torch.equal(a, b) for a, b in zip(trained[0], other, strict=True))


def test_parameters_are_whole_where_the_layouts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(block: float) -> list[Tensor]:
        monkeypatch.setattr(Rule, "block", block)
        parameters = make_parameters()
        rule = train(ELEMENTWISE["Lion"], parameters, steps=1)
        for p in parameters:
            # Gradients in rows, also for the channels_last parameter, and one with gaps.
            p.grad = torch.ones((*p.shape, 2)).cumsum(0)[..., 0] if p.ndim == 1 else torch.ones(p.shape)
        shapes = {theta.shape for bucket in rule._buckets(rule.param_groups[0]) for theta in bucket.theta}
        assert {(3, 7, 4, 4), (129,)} <= shapes
        assert ((5, 60) in shapes) == (block > 300)
        rule.step()
        return results(rule, parameters)

    assert all(torch.equal(a, b) for a, b in zip(trained(float("inf")), trained(64), strict=True))


def test_a_rule_is_elementwise_only_if_it_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rule, "block", 64)
    # Lion's subclass has a direction of its own, and Lamb says nothing.
    for make in (CautiousLion, Lamb):
        rule = train(make, make_parameters(), steps=1)
        assert (5, 60) in {theta.shape for bucket in rule._buckets(rule.param_groups[0]) for theta in bucket.theta}
