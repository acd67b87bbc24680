from __future__ import annotations

import pytest
from torch import nn

from harness.interface.roles import Role, parameter_roles


def test_roles_by_module_type_and_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 4), nn.Linear(4, 5), nn.LayerNorm(5))
    roles = parameter_roles(model, {"3.weight": "head"})
    assert roles == {
        "0.weight": Role.CONVOLUTION,
        "0.bias": Role.BIAS,
        "1.weight": Role.NORM,
        "1.bias": Role.BIAS,
        "2.weight": Role.EMBEDDING,
        "3.weight": Role.HEAD,
        "3.bias": Role.BIAS,
        "4.weight": Role.NORM,
        "4.bias": Role.BIAS,
    }
    assert parameter_roles(model)["3.weight"] == Role.HIDDEN_MATRIX


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="headd"):
        parameter_roles(nn.Linear(2, 2), {"headd.weight": "head"})
    with pytest.raises(ValueError, match="different roles"):
        parameter_roles(nn.Linear(2, 2), {"weight": "head", "w*": "stem"})
    with pytest.raises(ValueError, match="nonsense"):
        parameter_roles(nn.Linear(2, 2), {"weight": "nonsense"})
