"""The common base of update rules, tested with Lion where one rule is enough."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from submissions.adan import Adan
from submissions.blocks import Packs
from submissions.cautious import CautiousLion
from submissions.lamb import Lamb
from submissions.lion import Lion
from submissions.rule import Rule
from tests.submissions.rules import ELEMENTWISE, make_parameters, results, train


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


def without_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update small parameters one by one."""
    monkeypatch.setattr(Packs, "takes", lambda *_: False)


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


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_large_parameters_change_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_packs(monkeypatch)
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


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_parameters_together_change_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for small in (0, 128, 2**14):
        parameters = make_parameters(dtype)
        cls = type(ELEMENTWISE[name](parameters))
        monkeypatch.setattr(cls, "small", small, raising=False)
        rule = train(ELEMENTWISE[name], parameters, steps=6)
        trained.append(results(rule, parameters))
        entries = sum(len(bucket.theta) for bucket in rule._buckets(rule.param_groups[0]))
        # The scale of SGD-SaI is a number of each parameter.
        assert entries == (6 if small == 0 or name == "SGDSaI" else 4 if small == 128 else 2)
    for other in trained[1:]:
        for a, b in zip(trained[0], other, strict=True):
            if name == "DiffGrad":
                assert torch.allclose(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-7)
            else:
                assert torch.equal(a, b)


def test_small_parameters_together_are_saved_and_loaded_one_by_one() -> None:
    def gradients(parameters: list[nn.Parameter], step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(parameters):
            # Others are together in each step.
            p.grad = torch.randn(p.shape, generator=generator) if (index + step) % 4 else None

    ours, theirs = make_parameters(), make_parameters()
    rule, reference = Adan(ours, lr=0.1), Adan(theirs, lr=0.1)
    # Each parameter by itself, in pieces.
    reference.block = 1  # type: ignore[misc]
    for step in range(8):
        gradients(ours, step)
        gradients(theirs, step)
        rule.step()
        reference.step()
        # As a checkpoint does it: into a new rule, from copies.
        saved = copy.deepcopy(rule.state_dict())
        assert {k: s["momentum"].shape for k, s in saved["state"].items()} == {
            k: p.shape for k, p in enumerate(ours) if p in rule.state
        }
        rule = Adan(ours, lr=0.1)
        rule.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(results(rule, ours), results(reference, theirs), strict=True))


def test_parameters_are_whole_where_the_layouts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packs(monkeypatch)

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
