"""The models of scale=full against independent ones: equal parameter counts, and equal outputs with equal weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config.choices import list_variants
from harness.config.compose import load_run
from harness.config.hyperparameters import import_class
from harness.interface.roles import parameter_roles
from harness.interface.workload import Workload
from workloads.gpt2 import GPT2Model, GPT2Options
from workloads.vit import sincos2d

PROBLEMS = [("resnet", "base"), ("resnet", "imagenet"), ("vit", "base"), ("gpt2", "base")]


def build(name: str, variant: str = "base", *arguments: str) -> tuple[Workload, nn.Module]:
    spec = load_run([f"workload={name}", f"variant={variant}", "scale=full", "optimizer=sgd", *arguments]).spec
    workload: Workload = import_class(spec.class_path, "")(spec)
    torch.manual_seed(0)
    return workload, workload.build_model()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def torchvision() -> Any:
    # A torchvision for GPUs does not register these operators with a torch for CPUs.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision")


def copy_weights(source: nn.Module, target: nn.Module, rename: Callable[[str], str]) -> None:
    """Copy every tensor of `source` under its new name; the names must be exactly those of `target`."""
    renamed = {rename(name): tensor for name, tensor in source.state_dict().items()}
    target.load_state_dict(renamed, strict=True)


def randomise(model: nn.Module) -> None:
    """Randomise norms and biases. With their initial 0 and 1 a wrong assignment would not be noticed."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim <= 1:
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else 0.3 * torch.randn(tensor.shape) + 0.5)


# ---- torchvision ---------------------------------------------------------------------------------------------------


def resnet_names(stages: list[int], bottleneck: bool) -> Callable[[str], str]:
    """torchvision's names -> ours."""
    first = [sum(stages[:i]) for i in range(4)]
    last = "3" if bottleneck else "2"
    inner = {"conv1": "first", "bn1": "first_norm", f"conv{last}": "last", f"bn{last}": "last_norm",
             "downsample": "shortcut"} | ({"conv2": "middle", "bn2": "middle_norm"} if bottleneck else {})  # fmt: skip

    def rename(name: str) -> str:
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.*)", name):
            stage, block, part, rest = match.groups()
            return f"blocks.{first[int(stage) - 1] + int(block)}.{inner[part]}.{rest}"
        return name.replace("conv1.", "stem.").replace("bn1.", "stem_norm.").replace("fc.", "head.")

    return rename


@pytest.mark.parametrize(("depth", "stages"), [(18, [2, 2, 2, 2]), (50, [3, 4, 6, 3])])
def test_resnet_is_torchvisions(torchvision: Any, depth: int, stages: list[int]) -> None:
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    basic = ["workload.model.block=basic"] if depth == 18 else []
    ours = build("resnet", "imagenet", f"workload.model.stages={stages}", *basic)[1]
    assert count_parameters(ours) == count_parameters(theirs)
    randomise(theirs)
    copy_weights(theirs, ours, resnet_names(stages, bottleneck=depth == 50))
    images = torch.randn(2, 3, 96, 96)
    # Training mode first, so that the evaluation also compares the updated statistics.
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images), theirs.train(mode)(images), rtol=1e-3, atol=1e-3)
    print(f"ResNet-{depth}: {count_parameters(ours):,} parameters, the same outputs as torchvision's")


def vit_names(name: str) -> str:
    name = name.replace("encoder.layers.encoder_layer_", "blocks.").replace("class_token", "token")
    pairs = {"conv_proj": "embedding", "encoder.pos_embedding": "positions", "encoder.ln": "norm", "heads.head": "head",
             "ln_1": "attention_norm", "ln_2": "mlp_norm", "self_attention.in_proj_": "query_key_value.",
             "self_attention.out_proj": "project", "mlp.0": "expand", "mlp.3": "contract"}  # fmt: skip
    for theirs, ours in pairs.items():
        name = name.replace(theirs, ours)
    return name


def test_vit_is_torchvisions(torchvision: Any) -> None:
    """ViT-S/16 with a class token and learned positions, as in the first paper."""
    theirs = torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536)
    first = ["pooling=token", "positions=learned", "head_hidden=false"]
    ours = build("vit", "base", *(f"workload.model.{option}" for option in first))[1]
    assert count_parameters(ours) == count_parameters(theirs) == 22_050_664
    nn.init.normal_(theirs.heads.head.weight, std=0.1)
    randomise(theirs)
    copy_weights(theirs, ours, vit_names)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-3, atol=1e-3)
    print(f"ViT-S/16: {count_parameters(ours):,} parameters, the same outputs as torchvision's")


# ---- transformers --------------------------------------------------------------------------------------------------


def test_gpt2_is_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    ours = GPT2Model(GPT2Options(vocabulary=50257, context=1024, layers=12, width=768, heads=12))
    assert count_parameters(ours) == count_parameters(theirs) == 124_439_808
    randomise(theirs)
    pairs = {"transformer.": "", "wte": "tokens", "wpe": "positions", "h.": "blocks.", "ln_f": "norm",
             "ln_1": "attention_norm", "ln_2": "mlp_norm", "attn.c_attn": "query_key_value", "attn.c_proj": "project",
             "mlp.c_fc": "expand", "mlp.c_proj": "contract"}  # fmt: skip
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        # Tied to the token embedding.
        if name == "lm_head.weight":
            continue
        matrix = tensor.ndim == 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        for old, new in pairs.items():
            name = (
                re.sub(rf"(^|(?<=\.)){re.escape(old)}", new, name) if old != "transformer." else name.replace(old, new)
            )
        # Their matrices are [in, out].
        renamed[name] = tensor.T if matrix else tensor
    ours.load_state_dict(renamed, strict=True)
    tokens = torch.randint(50257, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens).logits, rtol=1e-3, atol=1e-3)
    print(f"GPT-2: {count_parameters(ours):,} parameters, the same outputs as transformers'")


# ---- without another library ---------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {problem: count_parameters(build(*problem)[1]) for problem in PROBLEMS}
    assert sizes == {
        ("resnet", "base"): 11_173_962,
        ("resnet", "imagenet"): 25_557_032,
        # 21,974,632 as torchvision without class token, plus the head's hidden layer; positions are not trained.
        ("vit", "base"): 22_050_664 - 384 * (1 + 1) + 384 * 385,
        ("gpt2", "base"): 124_439_808 + 47 * 768,
    }
    assert [name for name, p in build("vit")[1].named_parameters() if not p.requires_grad] == ["positions"]


@pytest.mark.parametrize(("name", "variant"), PROBLEMS)
def test_a_step_at_the_true_size(name: str, variant: str) -> None:
    workload, model = build(name, variant)
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Tensor]
    if name == "gpt2":
        tokens = torch.randint(50257, (1, 65), generator=generator)
        batch, classes = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}, 50_304
    else:
        side, classes = (32, 10) if (name, variant) == ("resnet", "base") else (224, 1000)
        labels = torch.randint(classes, (2,), generator=generator)
        batch = {"inputs": torch.randn(2, 3, side, side, generator=generator), "labels": labels}
    loss = workload.loss(workload.forward(model, batch), batch)
    assert abs(loss.item() - torch.tensor(float(classes)).log()) < 2.5
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert set(parameter_roles(model, workload.role_patterns()).values()) <= {
        "embedding", "head", "stem", "norm", "bias", "hidden_matrix", "convolution"
    }  # fmt: skip


def test_fixed_positions_one_by_one() -> None:
    table = sincos2d(3, 16)[0]
    for patch, row in enumerate(table):
        y, x = divmod(patch, 3)
        waves = [10_000.0 ** -(k / 3) for k in range(4)]
        angles = torch.tensor([[x * w for w in waves], [y * w for w in waves]], dtype=torch.float64)
        expected = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()]).float()
        torch.testing.assert_close(row, expected)


def test_the_heads_hidden_layer() -> None:
    small = "workload.model={image: 8, patch: 4, layers: 1, width: 8, heads: 2, classes: 3}"
    model = build("vit", "base", small)[1]
    nn.init.normal_(model.get_parameter("head.weight"))
    outputs: list[Tensor] = []
    model.get_submodule("norm").register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model(torch.randn(2, 3, 8, 8))
    hidden = model.get_submodule("head_hidden")
    assert isinstance(hidden, nn.Linear)
    expected = torch.tanh(F.linear(outputs[0].mean(1), hidden.weight, hidden.bias))
    torch.testing.assert_close(logits, model.get_submodule("head")(expected))


def test_full_scale_has_the_published_problems() -> None:
    assert list_variants("resnet", "full") == ["imagenet"]
    for name, variant in PROBLEMS:
        run = load_run([f"workload={name}", f"variant={variant}", "scale=full", "optimizer=adamw"])
        assert run.modified == () and run.spec.target_provenance["status"] == "published"
        assert run.spec.max_steps / run.spec.eval_every >= 50
