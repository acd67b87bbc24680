"""Muon against torch.optim.Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.roles import Role
from submissions.muon import Muon, MuonRule
from tests.submissions.parity import setup_of


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_treats_convolutions_as_matrices_in_any_layout(layout: torch.memory_format) -> None:
    """Against torch.optim.Muon on the flattened filters; orthogonalisation does not care about the order of columns."""
    torch.manual_seed(0)
    filters = torch.randn(8, 4, 3, 3)
    weight = nn.Parameter(filters.clone().to(memory_format=layout))
    bias = nn.Parameter(torch.zeros(8))
    setup = setup_of({"w": weight, "b": bias}, {"w": Role.CONVOLUTION, "b": Role.BIAS}, needs=Muon.needs)
    muon = Muon(setup, lr=0.1, weight_decay=0.1, adjust_lr_fn="original")
    matrix = nn.Parameter(filters.reshape(8, -1).clone())
    reference = torch.optim.Muon(
        [matrix], lr=0.1, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )

    class Context:
        step = 0.0

    for step in range(5):
        gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone().to(memory_format=layout)
        bias.grad = torch.ones(8)
        matrix.grad = gradient.reshape(8, -1).clone()
        context: Any = Context()
        muon.update(context)
        reference.step()
    # torch.optim.Muon orthogonalises in bfloat16, whose rounding does depend on the order.
    assert torch.allclose(weight.detach().reshape(8, -1), matrix.detach(), atol=0.02)
    assert (bias != 0).all()


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_up_to_rounding(adjust_lr_fn: str, nesterov: bool) -> None:
    shapes = [(6, 10), (10, 6), (6, 10), (7, 7), (12, 4), (10, 6), (260, 256)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    ours, theirs = ([nn.Parameter(values.clone()) for values in start] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 4}
    options |= {"nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    muon = MuonRule(ours, options)
    reference = torch.optim.Muon(theirs, **options)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    # The weights moved by about 0.5. The products of a batch of odd sizes are rounded to bfloat16 in another order.
    assert all(torch.allclose(a, b, atol=0.01) for a, b in zip(ours, theirs, strict=True))


def test_muon_claims_every_parameter_once() -> None:
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in
             {"embedding": (5, 3), "matrix": (3, 3), "norm": (3,), "head": (5, 3)}.items()}  # fmt: skip
    roles = {"embedding": Role.EMBEDDING, "matrix": Role.HIDDEN_MATRIX, "norm": Role.NORM, "head": Role.HEAD}
    muon = Muon(setup_of(named, roles, no_decay={Role.NORM}, needs=Muon.needs), adamw_weight_decay=0.1)
    matrices, rest = muon.optimizers
    assert [p.shape for group in matrices.param_groups for p in group["params"]] == [(3, 3)]
    assert [group["weight_decay"] for group in rest.param_groups] == [0.1, 0.0]
    only_head = {"head": named["head"]}
    assert len(Muon(setup_of(only_head, roles, needs=Muon.needs)).optimizers) == 1
