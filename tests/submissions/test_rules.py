"""What the rules share: which parameters they see, batches of one shape, state in its own precision, blocks, claims."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from harness.needs import Need, UndeclaredNeed
from harness.roles import Role
from harness.submission import OptimizerSubmission
from submissions.list_rule import Group, ListRule
from submissions.matrices import MatrixRule, MatrixSubmission, eigenvectors, leading_right_vectors
from tests.submissions.mixed import MixedTraining


class Momentum(MatrixRule):
    def direction(self, parameters: list[Tensor], gradient: Tensor, group: Group) -> Tensor:
        return self.stacked(parameters, "momentum").lerp_(gradient, 0.1)


def momentum(parameters: list[nn.Parameter]) -> Momentum:
    return Momentum(parameters, {"lr": 0.1, "weight_decay": 0.0})


def test_matrices_of_one_shape_share_a_batch_and_each_keeps_its_own_state() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    rule, alone = momentum(parameters), [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    separate = [momentum([p]) for p in alone]
    for step in range(6):
        for k, (p, q) in enumerate(zip(parameters, alone, strict=True)):
            g = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + k))
            # The second has no gradient at times, and the first none at first.
            p.grad = q.grad = None if (k == 1 and step in (2, 4)) or (k == 0 and step == 0) else g
        rule.step()
        for other in separate:
            other.step()
        for p, q in zip(parameters, alone, strict=True):
            assert torch.equal(p, q)
    storages = {rule.state[p]["momentum"].untyped_storage().data_ptr() for p in parameters}
    assert len(storages) == 1


def test_nothing_is_copied_from_step_to_step() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    rule = momentum(parameters)
    addresses = []
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones(2, 3)
        rule.step()
        addresses.append([rule.state[p]["momentum"].data_ptr() for p in parameters])
    assert addresses[0] == addresses[1] == addresses[2]


def test_a_loaded_state_keeps_its_dtype_and_a_closure_is_called() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    rule = momentum([parameter])

    def closure() -> Tensor:
        parameter.grad = torch.full((2, 3), 0.3, dtype=torch.bfloat16)
        return torch.tensor(2.0)

    assert rule.step(closure) == 2
    saved = copy.deepcopy(rule.state_dict())
    other = momentum([parameter])
    other.load_state_dict(saved)
    assert other.state[parameter]["momentum"].dtype == torch.float32
    assert torch.equal(other.state[parameter]["momentum"], rule.state[parameter]["momentum"])
    assert other.param_groups[0]["step"] == 1


def test_empty_tensors_and_missing_gradients_leave_no_state() -> None:
    class Plain(ListRule):
        def update(self, parameters: list[Tensor], gradients: list[Tensor], group: Group) -> None:
            self.tensors(parameters, "seen")

    used, unused, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))
    used.grad, empty.grad = torch.ones(2), torch.ones(0)
    rule = Plain([used, unused, empty], {"lr": 0.1})
    rule.step()
    assert list(rule.state) == [used]


class Blocks(MatrixSubmission):
    def __init__(self, setup, block_size=None) -> None:  # type: ignore[no-untyped-def]
        adamw = {"lr": 0.0, "weight_decay": 0.0}
        super().__init__(
            setup, lambda groups: Momentum(groups, {"lr": 0.1, "weight_decay": 0.5}), adamw, block_size=block_size
        )


def test_blocks_cover_every_matrix_and_weight_decay_heeds_the_roles() -> None:
    whole, blocks = MixedTraining(Blocks, {}), MixedTraining(Blocks, {"block_size": 5})
    exempt = MixedTraining(Blocks, {}, no_decay=[Role.CONVOLUTION])
    for training in (whole, blocks, exempt):
        before = training.parameters()
        training.step()
        after = training.parameters()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"first.weight", "second.weight", "hidden.weight", "again.weight", "more.weight"}
    for name, parameter in whole.parameters().items():
        assert torch.equal(parameter, blocks.parameters()[name])
    assert not torch.equal(whole.parameters()["first.weight"], exempt.parameters()["first.weight"])
    assert torch.equal(whole.parameters()["more.weight"], exempt.parameters()["more.weight"])


@pytest.mark.parametrize("claim", [lambda ps: ps[:-1], lambda ps: [*ps[:-1], ps[0].view(-1)[:1], ps[-1]]])
def test_claims_with_a_gap_or_an_overlap_are_refused(claim) -> None:  # type: ignore[no-untyped-def]
    class Wrong(OptimizerSubmission):
        def __init__(self, setup) -> None:  # type: ignore[no-untyped-def]
            super().__init__(setup, [torch.optim.SGD([p.detach() for p in claim(setup.parameters)], lr=0.1)])

    with pytest.raises(ValueError, match="each must be claimed once"):
        MixedTraining(Wrong, {})


def test_the_models_statistics_belong_to_those_who_average() -> None:
    class Averaging(OptimizerSubmission):
        needs = frozenset({Need.EVALUATION_WEIGHTS})

        def __init__(self, setup) -> None:  # type: ignore[no-untyped-def]
            super().__init__(setup, [torch.optim.SGD(setup.parameters, lr=0.1)])
            assert [b.shape for b in setup.statistics] == [(6,), (6,)]

    class Undeclared(Averaging):
        needs = frozenset()

    MixedTraining(Averaging, {})
    with pytest.raises(UndeclaredNeed, match="EVALUATION_WEIGHTS"):
        MixedTraining(Undeclared, {})


def test_numbers_that_are_not_finite_make_nan_and_no_crash() -> None:
    bad = torch.full((2, 3, 3), torch.inf)
    assert all(x.isnan().all() for x in eigenvectors(bad))
    assert leading_right_vectors(bad, 2).isnan().all()
