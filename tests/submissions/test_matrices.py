"""The common base of rules for matrices: batches of equal shape, stacked state, blocks, claims, infinities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import OptimizerSubmission, Role, Setup
from submissions.matrices import (
    MatrixRule,
    MatrixSubmission,
    eigendecomposition,
    leading_right_singular_vectors,
    stack_state,
)
from submissions.rule import Bucket
from tests.submissions.parity import make_setup


class Momentum(MatrixRule):
    buffers = ("momentum",)

    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        return stack_state(bucket, "momentum").lerp_(gradient, 0.1)


def momentum(parameters: Any, weight_decay: float = 0.0) -> Momentum:
    return Momentum(parameters, {"lr": 0.1, "weight_decay": weight_decay})


def matrices(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, 3)) for _ in range(count)]


def test_matrices_of_one_shape_share_a_batch_and_each_keeps_its_own_state() -> None:
    parameters, alone = matrices(3), matrices(3)
    rule, separate = momentum(parameters), [momentum([p]) for p in alone]
    for step in range(6):
        for k, (p, q) in enumerate(zip(parameters, alone, strict=True)):
            g = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + k))
            # The second has no gradient at times, and the first none at first.
            p.grad = q.grad = None if (k == 1 and step in (2, 4)) or (k == 0 and step == 0) else g
        rule.step()
        for single in separate:
            single.step()
        for p, q in zip(parameters, alone, strict=True):
            assert torch.equal(p, q)


def test_nothing_is_copied_from_step_to_step() -> None:
    parameters = matrices(3)
    rule, addresses = momentum(parameters), []
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones(2, 3)
        rule.step()
        addresses.append([rule.state[p]["momentum"].data_ptr() for p in parameters])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len({rule.state[p]["momentum"].untyped_storage().data_ptr() for p in parameters}) == 1


def test_training_continues_from_a_loaded_state() -> None:
    parameters, copies = matrices(2), matrices(2)
    original, resumed = momentum(parameters), momentum(copies)
    for step in range(4):
        if step == 2:
            resumed.load_state_dict(copy.deepcopy(original.state_dict()))
            for p, q in zip(parameters, copies, strict=True):
                q.data.copy_(p)
        for p, q in zip(parameters, copies, strict=True):
            p.grad = q.grad = torch.full((2, 3), float(step + 1))
        original.step()
        if step >= 2:
            resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, copies, strict=True))


class Blocks(MatrixSubmission):
    def __init__(self, setup: Setup, block_size: int | None = None) -> None:
        super().__init__(setup, lambda groups: momentum(groups, 0.5), {"lr": 0.0}, block_size=block_size)


ROLES = {
    "matrix": Role.HIDDEN_MATRIX, "filters": Role.CONVOLUTION, "none": Role.HIDDEN_MATRIX, "empty": Role.HIDDEN_MATRIX,
    "head": Role.HEAD, "bias": Role.BIAS,
}  # fmt: skip


def weights_after_two_steps(block_size: int | None, no_decay: tuple[Role, ...] = ()) -> dict[str, nn.Parameter]:
    """Weights after two steps, with filters in channels_last."""
    torch.manual_seed(0)
    shapes = {"matrix": (7, 12), "filters": (6, 4, 3, 3), "none": (2, 2), "empty": (0, 3), "head": (3, 4), "bias": (3,)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    named["filters"] = nn.Parameter(named["filters"].detach().to(memory_format=torch.channels_last))
    submission = Blocks(make_setup(named, ROLES, no_decay=no_decay, needs=Blocks.needs), block_size)
    for _ in range(2):
        for name, p in named.items():
            p.grad = None if name == "none" else torch.randn(p.shape)
        submission.update(type("Context", (), {"step": 0.0})())
    assert all(view.grad is None for view, _, _ in submission._views)
    return named


def test_blocks_cover_every_matrix_and_weight_decay_follows_the_roles() -> None:
    unblocked = weights_after_two_steps(None)
    blocked = weights_after_two_steps(5)
    exempt = weights_after_two_steps(None, (Role.CONVOLUTION,))
    for name in ROLES:
        assert torch.equal(unblocked[name], blocked[name])
        assert torch.equal(unblocked[name], exempt[name]) == (name != "filters")


@pytest.mark.parametrize("claim", [lambda ps: ps[:-1], lambda ps: [*ps[:-1], ps[0].view(-1)[:1], ps[-1]]])
def test_claims_with_a_gap_or_an_overlap_are_refused(claim: Any) -> None:
    class Wrong(OptimizerSubmission):
        def __init__(self, setup: Setup) -> None:
            super().__init__(setup, [torch.optim.SGD([p.detach() for p in claim(setup.parameters)], lr=0.1)])

    with pytest.raises(ValueError, match="each must be claimed once"):
        Wrong(make_setup({"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(3))}))


def test_numbers_that_are_not_finite_give_nan_and_no_crash() -> None:
    bad = torch.full((2, 3, 3), torch.inf)
    assert all(x.isnan().all() for x in eigendecomposition(bad))
    assert leading_right_singular_vectors(bad, 2).isnan().all()
