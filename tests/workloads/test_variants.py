"""Held-out variants differ from their workload in one option, and do not change the workload's own bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config.choices import list_choices, list_variants
from harness.config.compose import load_run
from harness.config.hyperparameters import import_class
from harness.interface.roles import parameter_roles
from harness.interface.workload import Workload
from workloads import gpt2, resnet, vit

PAIRS = [(workload, variant) for workload in list_choices("workload") for variant in list_variants(workload, "mini")]


def build(name: str, variant: str = "base") -> tuple[Workload, nn.Module]:
    """The workload at scale=mini and its model from seed 0, without dropout."""
    spec = load_run([f"workload={name}", f"variant={variant}", "workload.target=1", "optimizer=adamw"]).spec
    workload: Workload = import_class(spec.class_path, "")(spec)
    torch.manual_seed(0)
    return workload, workload.build_model().eval()


def random_inputs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "gpt2":
        return torch.randint(256, (4, 64), generator=generator)
    return torch.randn(4, 1, 28, 28, generator=generator)


def test_every_workload_has_two_variants() -> None:
    assert len(PAIRS) == 2 * len(list_choices("workload")) == 6


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_one_option_differs(name: str, variant: str) -> None:
    base, other = (build(name, which)[0].model_options.model_dump() for which in ("base", variant))
    assert len([key for key in base if base[key] != other[key]]) == 1


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_only_the_parameters_of_the_variant_differ(name: str, variant: str) -> None:
    """Names, shapes and initial bits are those of the base, except for the option that the variant changes."""
    base, other = (dict(build(name, which)[1].named_parameters()) for which in ("base", variant))
    changed = {name for name in base.keys() & other.keys() if not torch.equal(base[name], other[name])}
    lost, new = base.keys() - other.keys(), other.keys() - base.keys()
    if variant == "large-bn-init":
        assert changed == {f"blocks.{i}.last_norm.weight" for i in range(3)}
        assert all((other[name] == 8).all() for name in changed)
    else:
        assert not changed
    assert lost == ({"norm.weight", "norm.bias"} if variant == "post-ln" else set())
    assert {name.partition(".")[0] for name in new} == ({"pool"} if variant == "map" else set())


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_outputs_differ_and_every_parameter_has_a_gradient(name: str, variant: str) -> None:
    outputs = []
    for which in ("base", variant):
        workload, model = build(name, which)
        # The head of the ViT starts at zero.
        if name == "vit":
            nn.init.normal_(model.get_parameter("head.weight"), generator=torch.Generator().manual_seed(2))
        outputs.append(model(random_inputs(name)))
    assert outputs[0].shape == outputs[1].shape and not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    outputs[1].square().sum().backward()
    without_gradient = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without_gradient
    roles = parameter_roles(model, workload.role_patterns())
    assert "other" not in set(roles.values())
    assert {key for key in roles if key.endswith("probe")} <= {key for key, r in roles.items() if r == "embedding"}


@pytest.mark.parametrize("variant", list_variants("gpt2", "mini"))
def test_variants_of_gpt2_learn(variant: str) -> None:
    workload, model = build("gpt2", variant)
    batch = {"inputs": random_inputs("gpt2"), "labels": random_inputs("gpt2").roll(-1, 1)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = workload.loss(workload.forward(model, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


# -- Against equations ------------------------------------------------------------------------------------------------


def attention(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in block.query_key_value(x).chunk(3, -1))  # type: ignore[operator]
    scores = q @ k.transpose(-1, -2) / 2
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return block.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return, operator]


def test_gpt2_norms_each_branch_before_the_addition() -> None:
    torch.manual_seed(0)
    block, x = gpt2.Block(12, 3, 0.0, "silu", "res-post").double(), torch.randn(2, 8, 12, dtype=torch.float64)
    middle = x + block.attention_norm(attention(block, x, causal=True))
    hidden = block.expand(middle)
    expected = middle + block.mlp_norm(block.contract(hidden * torch.sigmoid(hidden)))
    torch.testing.assert_close(block(x), expected)


def test_vit_norms_after_each_addition() -> None:
    torch.manual_seed(0)
    block, x = vit.Block(12, 3, 20, 0.0, "post").double(), torch.randn(2, 5, 12, dtype=torch.float64)
    middle = block.attention_norm(x + attention(block, x, causal=False))
    expected = block.mlp_norm(middle + block.contract(F.gelu(block.expand(middle))))
    torch.testing.assert_close(block(x), expected)


def test_vit_pools_by_attention_of_a_probe() -> None:
    torch.manual_seed(0)
    pool, x = vit.AttentionPool(12, 3, 20, 0.0).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    key, value = pool.key_value(x).chunk(2, -1)
    q = pool.query(pool.probe).unflatten(-1, (3, 4)).squeeze(0)
    scores = torch.einsum("hc,nthc->nht", q, key.unflatten(-1, (3, 4))) / 2
    gathered = torch.einsum("nht,nthc->nhc", scores.softmax(-1), value.unflatten(-1, (3, 4))).flatten(1)
    pooled = pool.project(gathered)
    expected = pooled + pool.contract(F.gelu(pool.expand(pool.mlp_norm(pooled))))
    torch.testing.assert_close(pool(x), expected)
    shuffled = x[:, torch.randperm(5)]
    torch.testing.assert_close(pool(shuffled), expected)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_has_silu_everywhere(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"channels": 1, "classes": 3, "width": 4, "stages": [1, 1], "block": block, "activation": "silu"}
    model = resnet.ResNetModel(resnet.ResNetOptions.model_validate(options))

    def refused(x: Tensor) -> Tensor:
        raise AssertionError("a ReLU in the SiLU variant")

    monkeypatch.setattr(F, "relu", refused)
    monkeypatch.setattr(torch, "relu", refused)
    assert model(torch.randn(2, 1, 8, 8)).isfinite().all()


# -- The base ---------------------------------------------------------------------------------------------------------


def gpt2_block(block: gpt2.Block, x: Tensor) -> Tensor:
    n, t, width = x.shape
    shape = (n, t, 3, block.heads, width // block.heads)
    q, k, v = block.query_key_value(block.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
    x = x + block.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    return x + block.contract(F.gelu(block.expand(block.mlp_norm(x)), approximate="tanh"))


def vit_block(block: vit.Block, x: Tensor) -> Tensor:
    n, t, width = x.shape
    shape = (n, t, 3, block.heads, width // block.heads)
    q, k, v = block.query_key_value(block.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
    x = x + block.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.contract(F.gelu(block.expand(block.mlp_norm(x))))


def resnet_block(block: resnet.BasicBlock, x: Tensor) -> Tensor:
    y = F.relu(block.first_norm(block.first(x)))
    return F.relu(block.last_norm(block.last(y)) + block.shortcut(x))


@pytest.mark.parametrize(("name", "block_forward"),
                         [("gpt2", gpt2_block), ("resnet", resnet_block), ("vit", vit_block)])  # fmt: skip
def test_the_base_keeps_its_bits(name: str, block_forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Each block makes the same operations in the same order as before variants were added."""
    model = build(name)[1]
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    model(random_inputs(name))
    assert seen
    for block, x, output in seen:
        assert torch.equal(output, block_forward(block, x))
