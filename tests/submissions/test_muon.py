"""Muon against torch.optim.Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.interface import Role
from submissions.muon import Muon
from tests.submissions.parity import make_setup


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_treats_convolutions_as_matrices_in_any_layout(layout: torch.memory_format) -> None:
    """Against torch.optim.Muon on the flattened filters; orthogonalisation does not care about the order of columns."""
    torch.manual_seed(0)
    filters = torch.randn(8, 4, 3, 3)
    weight = nn.Parameter(filters.clone().to(memory_format=layout))
    bias = nn.Parameter(torch.zeros(8))
    setup = make_setup({"w": weight, "b": bias}, {"w": Role.CONVOLUTION, "b": Role.BIAS}, needs=Muon.needs)
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


def test_muon_claims_every_parameter_once() -> None:
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in
             {"embedding": (5, 3), "matrix": (3, 3), "norm": (3,), "head": (5, 3)}.items()}  # fmt: skip
    roles = {"embedding": Role.EMBEDDING, "matrix": Role.HIDDEN_MATRIX, "norm": Role.NORM, "head": Role.HEAD}
    muon = Muon(make_setup(named, roles, no_decay={Role.NORM}, needs=Muon.needs), adamw_weight_decay=0.1)
    matrices, rest = muon.optimizers
    assert [p.shape for group in matrices.param_groups for p in group["params"]] == [(3, 3)]
    assert [group["weight_decay"] for group in rest.param_groups] == [0.1, 0.0]
    only_head = {"head": named["head"]}
    assert len(Muon(make_setup(only_head, roles, needs=Muon.needs)).optimizers) == 1
