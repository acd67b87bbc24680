from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from harness.interface.roles import parameter_roles
from harness.interface.workload import WorkloadSpec
from workloads.resnet import BasicBlock, Bottleneck, ResNet, ResNetModel, ResNetOptions

RESNET20 = ResNetOptions(channels=3, classes=10, width=16, stages=[3, 3, 3])
RESNET18 = ResNetOptions(channels=3, classes=10, width=64, stages=[2, 2, 2, 2])
RESNET50 = ResNetOptions(
    channels=3, classes=1000, width=64, stages=[3, 4, 6, 3], block="bottleneck", stem="imagenet"
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "side", "features", "parameters"),
    [
        # He et al. count 0.27 M with padded shortcuts; here two 1x1 convolutions and their norms are added.
        (RESNET20, 32, (64, 8, 8), 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
        (RESNET18, 32, (512, 4, 4), 11_173_962),
        (RESNET50, 224, (2048, 7, 7), 25_557_032),
    ],
    ids=["ResNet-20", "ResNet-18 for CIFAR", "ResNet-50"],
)
def test_published_sizes(options: ResNetOptions, side: int, features: tuple[int, int, int], parameters: int) -> None:
    with torch.device("meta"):
        model, images = ResNetModel(options), torch.empty(2, 3, side, side)
        assert model.blocks(model.pool(model.stem(images))).shape == (2, *features)
        assert model(images).shape == (2, options.classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("options", [RESNET20, RESNET50], ids=["basic", "bottleneck"])
def test_with_zero_init_every_block_is_the_identity(options: ResNetOptions) -> None:
    small = options.model_copy(update={"bn_init_scale": 0.0, "width": 4, "stages": [2]})
    block = ResNetModel(small).blocks[1]
    assert isinstance(block, BasicBlock | Bottleneck)
    x = torch.rand(2, block.last.out_channels, 4, 4)
    assert torch.equal(block(x), x)
    # A zero in an earlier norm would give the same output, but no gradients in the branch.
    assert not block.last_norm.weight.any() and block.first_norm.weight.all()


def test_convolutions_start_at_he_scale() -> None:
    torch.manual_seed(0)
    model = ResNetModel(RESNET18.model_copy(update={"stages": [1]}))
    weight = model.blocks[0].get_parameter("last.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_mini_model_and_its_roles(make_spec: Callable[..., WorkloadSpec]) -> None:
    workload = ResNet(make_spec("resnet"))
    torch.manual_seed(0)
    model = workload.build_model()
    images = torch.randn(8, 1, 28, 28)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images), model(images))
    assert model(images).shape == (8, 10)
    roles = parameter_roles(model, workload.role_patterns())
    assert [name for name, role in roles.items() if role == "stem"] == ["stem.weight"]
    assert [name for name, role in roles.items() if role == "head"] == ["head.weight"]
    assert set(roles.values()) == {"stem", "head", "convolution", "norm", "bias"}


@pytest.mark.parametrize("options", [{"stages": []}, {"stem_stride": 0}, {"block": "wide"}, {"widht": 8}])
def test_bad_options_are_named(make_spec: Callable[..., WorkloadSpec], options: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        ResNet(make_spec("resnet", model=options))
