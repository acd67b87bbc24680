"""Compiled update rules against the same rules executed operation by operation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from typing_extensions import override

from submissions.compilation import CompiledUpdate
from submissions.lamb import Lamb
from submissions.lion import Lion
from submissions.rule import Bucket, Rule, Tensors
from tests.submissions.rules import ELEMENTWISE, MakeRule, make_parameters, results, train

PROGRAMS = {"Adopt": 2, "Sophia": 2}
"""Rules whose operations differ between steps: the first moves nothing; some have a new estimate. All others have 1."""


def compiled(make: MakeRule) -> MakeRule:
    def make_compiled(parameters: Sequence[nn.Parameter]) -> Rule:
        rule = make(parameters)
        rule.compile_update()
        return rule

    return make_compiled


def programs(rule: Rule) -> int:
    assert isinstance(rule._compiled, CompiledUpdate)
    return len(rule._compiled._compiled)


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal up to a rounding of each step, relative to the largest element."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        if a.numel():
            assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled is executed as it is."""

    def take_module(module: nn.Module, **options: Any) -> nn.Module:
        return module

    monkeypatch.setattr(torch, "compile", take_module)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_compiled_is_the_rule(name: str, uncompiled: None) -> None:
    ours, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    rule, reference = train(compiled(ELEMENTWISE[name]), ours), train(ELEMENTWISE[name], theirs)
    for a, b in zip(results(rule, ours), results(reference, theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    # The learning rate and the step change, the program does not.
    assert programs(rule) == PROGRAMS.get(name, 1)


@pytest.mark.xdist_group("inductor")
def test_a_compiled_rule_agrees_and_is_compiled_once() -> None:
    make = ELEMENTWISE["AdEMAMix"]
    ours, theirs = make_parameters(), make_parameters()
    before = counters["stats"]["unique_graphs"]
    rule = train(compiled(make), ours, steps=6)
    assert counters["stats"]["unique_graphs"] - before == 1
    assert_alike(results(rule, ours), results(train(make, theirs, steps=6), theirs))


def test_parameters_that_join_later_get_a_program_of_their_own(uncompiled: None) -> None:
    def trained(make: MakeRule) -> tuple[Rule, list[Tensor]]:
        first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
        rule = make([first, second])
        for step in range(3):
            first.grad, second.grad = torch.ones(3), torch.ones(4) if step else None
            rule.step()
        return rule, [first.detach(), second.detach()]

    (rule, ours), (_, theirs) = trained(compiled(ELEMENTWISE["Adan"])), trained(ELEMENTWISE["Adan"])
    assert programs(rule) == 2
    assert_alike(ours, theirs)


def test_narrow_parameters_are_rounded_once(uncompiled: None) -> None:
    ours, theirs = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    train(compiled(ELEMENTWISE["Lion"]), ours)
    train(ELEMENTWISE["Lion"], theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.allclose(a.detach().float(), b.detach().float(), rtol=2**-7)


def test_a_rule_that_is_not_elementwise_is_not_compiled() -> None:
    rule = Lamb(make_parameters())
    rule.compile_update()
    assert rule._compiled is None


class _Unknown(Lion):
    """Uses an operation that the compilation does not know."""

    elementwise = True

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return [torch.erf(g) for g in bucket.g]


class _Method(Lion):
    """Calls a method of a tensor."""

    elementwise = True

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        return [g.tanh() for g in bucket.g]


@pytest.mark.parametrize(("cls", "operation"), [(_Unknown, "torch.erf"), (_Method, "Tensor.tanh")])
def test_other_rules_are_executed_as_they_are(
    cls: type[Lion], operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = make_parameters(), make_parameters()
    with caplog.at_level(logging.WARNING):
        rule = train(compiled(cls), ours)
    assert caplog.text.count(operation) == 1
    reference = train(cls, theirs)
    assert all(torch.equal(a, b) for a, b in zip(results(rule, ours), results(reference, theirs), strict=True))
