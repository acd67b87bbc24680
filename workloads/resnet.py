"""Residual networks (He et al. 2016, arXiv:1512.03385) for image classification.

A stage has a number of blocks; each stage is twice as wide as the previous one and, from the second on, has half the
resolution. Three stages of one block at width 16 are ResNet-8; four of two at width 64 with a 3x3 stem are the usual
ResNet-18 for CIFAR; bottleneck blocks (3, 4, 6, 3) with the ImageNet stem are ResNet-50. The held-out variants change
the activation, or the initial scale of the last BatchNorm of each block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from typing_extensions import override

from workloads.image_classification import ImageClassification

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "silu": F.silu}


class ResNetOptions(BaseModel):
    """Size and architecture of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(ge=1)
    """Channels of the images."""
    classes: int = Field(ge=2)
    width: int = Field(ge=1)
    """Channels of the first stage."""
    stages: list[int] = Field(min_length=1)
    """Blocks per stage."""
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: a 3x3 convolution; imagenet: 7x7 at stride 2, then max pooling at stride 2."""
    stem_stride: int = Field(default=1, ge=1, le=4)
    """Stride of the cifar stem; a larger one lowers the cost of the whole network."""
    activation: Literal["relu", "silu"] = "relu"
    bn_momentum: float = Field(default=0.1, gt=0, le=1)
    """Share of the last batch in BatchNorm's running statistics, as in torch. With few large steps the usual 0.1 is too
    small: statistics that lag behind the weights add noise to every evaluation."""
    bn_init_scale: float = Field(default=1.0, ge=0)
    """Initial scale of the last BatchNorm of each block. With 0 every block starts as the identity (Goyal et al. 2017);
    8 is AlgoPerf's variant (Dahl et al. 2023)."""


class ResNetModel(nn.Module):
    """Images float [n, channels, h, w] -> logits [n, classes]."""

    def __init__(self, options: ResNetOptions) -> None:
        super().__init__()
        width = options.width
        if options.stem == "cifar":
            self.stem = _convolution(options.channels, width, 3, options.stem_stride)
            self.pool: nn.Module = nn.Identity()
        else:
            self.stem = _convolution(options.channels, width, 7, 2)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem_norm = nn.BatchNorm2d(width)
        self.activation = ACTIVATIONS[options.activation]
        block = BasicBlock if options.block == "basic" else Bottleneck
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(options.stages):
            for index in range(count):
                # The first block of every stage but the first halves the resolution.
                stride = 2 if stage and not index else 1
                blocks.append(block(channels, width << stage, stride, self.activation))
                channels = (width << stage) * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, options.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # Here rather than in each constructor call above.
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = options.bn_momentum
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.constant_(module.last_norm.weight, options.bn_init_scale)

    @override
    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.activation(self.stem_norm(self.stem(images))))
        return self.head(self.blocks(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual: [n, channels, h, w] -> [n, width, h / stride, w / stride]."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.first = _convolution(channels, width, 3, stride)
        self.first_norm = nn.BatchNorm2d(width)
        self.last = _convolution(width, width, 3, 1)
        self.last_norm = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels, width, stride)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.first_norm(self.first(x)))
        return self.activation(self.last_norm(self.last(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a residual; the 3x3 has the stride (Goyal et al. 2017).

    [n, channels, h, w] -> [n, 4 width, h / stride, w / stride].
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.first = _convolution(channels, width, 1, 1)
        self.first_norm = nn.BatchNorm2d(width)
        self.middle = _convolution(width, width, 3, stride)
        self.middle_norm = nn.BatchNorm2d(width)
        self.last = _convolution(width, width * self.expansion, 1, 1)
        self.last_norm = nn.BatchNorm2d(width * self.expansion)
        self.shortcut = _shortcut(channels, width * self.expansion, stride)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.first_norm(self.first(x)))
        y = self.activation(self.middle_norm(self.middle(y)))
        return self.activation(self.last_norm(self.last(y)) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    """A convolution that keeps the resolution up to its stride; a BatchNorm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution where the shapes differ."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(ImageClassification):
    """Image classification with a residual network."""

    Model = ResNetOptions

    @override
    def build_model(self) -> nn.Module:
        return ResNetModel(self.model_options)

    @override
    def role_patterns(self) -> dict[str, str]:
        return {"stem.weight": "stem", "head.weight": "head"}
