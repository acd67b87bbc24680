from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from harness.interface.roles import parameter_roles
from harness.interface.workload import WorkloadSpec
from workloads.vit import Block, ViT, ViTModel, ViTOptions

VIT_S16 = ViTOptions(image=224, channels=3, classes=1000, patch=16, layers=12, width=384, heads=6)


def test_published_size() -> None:
    with torch.device("meta"):
        model = ViTModel(VIT_S16)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_050_664


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_mini_model_and_its_roles(make_spec: Callable[..., WorkloadSpec], pooling: str) -> None:
    workload = ViT(make_spec("vit", model={"pooling": pooling}))
    torch.manual_seed(0)
    model = workload.build_model()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    roles = parameter_roles(model, workload.role_patterns())
    token = {"token"} if pooling == "token" else set()
    assert {name for name, role in roles.items() if role == "embedding"} == {"embedding.weight", "positions"} | token
    assert sum(role == "hidden_matrix" for role in roles.values()) == 4 * workload.model_options.layers
    assert set(roles.values()) == {"embedding", "head", "hidden_matrix", "norm", "bias"}


def test_roles_of_one_pooling_do_not_affect_another(make_spec: Callable[..., WorkloadSpec]) -> None:
    token, mean = (ViT(make_spec("vit", model={"pooling": pooling})).role_patterns() for pooling in ("token", "mean"))
    assert token == mean | {"token": "embedding"}


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_the_input_of_the_head(pooling: str) -> None:
    torch.manual_seed(0)
    small = {"image": 4, "channels": 1, "classes": 3, "patch": 2, "layers": 1, "width": 8, "heads": 2}
    model = ViTModel(ViTOptions.model_validate(small | {"pooling": pooling}))
    head_inputs: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    model.head.register_forward_hook(lambda module, inputs, output: head_inputs.append(inputs[0]))
    model(torch.randn(2, 1, 4, 4))
    assert tokens[0].shape == (2, 5 if pooling == "token" else 4, 8)
    assert torch.equal(head_inputs[0], tokens[0][:, 0] if pooling == "token" else tokens[0].mean(1))


def test_block_against_its_equations() -> None:
    torch.manual_seed(0)
    block, x = Block(12, 3, 20, 0.0).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    parts = block.query_key_value(block.attention_norm(x)).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in parts)
    attended = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    middle = x + block.project(attended.transpose(1, 2).flatten(2))
    hidden = block.expand(block.mlp_norm(middle))
    expected = middle + block.contract(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    torch.testing.assert_close(block(x), expected)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    block, x = Block(12, 3, 20, 0.5), torch.randn(2, 5, 12)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50, "heads": 4}, "width=50 must be a multiple of heads=4"),
        ({"patch": 5}, "image=28 must be a multiple of patch=5"),
        ({"pooling": "max"}, "pooling"),
        ({"layer": 2}, "layer"),
    ],
)
def test_bad_options_are_named(make_spec: Callable[..., WorkloadSpec], options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViT(make_spec("vit", model=options))
