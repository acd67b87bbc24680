"""Residual networks with BatchNorm (He et al. 2015, arXiv:1512.03385), from CIFAR-style ResNet-8 to ResNet-50.

One description covers both families of the paper: three stages of basic blocks (6n + 2 layers, widths w, 2w, 4w) for
small pictures, and four stages behind a 7x7 stem with pooling for large ones. A shortcut that changes shape is a 1x1
convolution (the paper's option B).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from workloads.image_classification import ImageClassification


class ResNetModel(BaseModel):
    """Shape of the network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(ge=1)
    """Of the pictures: 1 grey, 3 colour."""
    classes: int = Field(ge=2)
    """Number of classes."""
    stem: Literal["cifar", "imagenet"]
    """A 3x3 convolution, or a 7x7 convolution and a 3x3 max-pooling of stride 2."""
    stem_stride: int = Field(ge=1, le=4)
    """Stride of the stem's convolution: 1 for CIFAR, 2 for ImageNet, 2 to make small pictures cheap."""
    block: Literal["basic", "bottleneck"]
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width at the end."""
    depths: tuple[int, ...] = Field(min_length=1)
    """Blocks per stage; every stage after the first halves the picture."""
    width: int = Field(ge=1)
    """Channels of the first stage; every later stage doubles them."""
    zero_init_residual: bool
    """Whether each block starts as the identity: last BatchNorm's scale 0 (Goyal et al. 2017, arXiv:1706.02677)."""


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, since a BatchNorm follows; padded so that stride 1 keeps the size."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """A residual block, [n, inputs, h, w] -> [n, width x expansion, h / stride, w / stride]."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            # The stride sits on the 3x3 convolution, where it loses least ("ResNet v1.5").
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            sizes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for size in sizes:
            layers += [convolution(*size), nn.BatchNorm2d(size[1]), nn.ReLU(inplace=True)]
        self.branch = nn.Sequential(*layers[:-1])  # The last activation follows the sum.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class Net(nn.Module):
    """Pictures [n, channels, height, width] -> logits [n, classes]."""

    def __init__(self, options: ResNetModel) -> None:
        super().__init__()
        stem = [
            convolution(options.channels, options.width, 3 if options.stem == "cifar" else 7, options.stem_stride),
            nn.BatchNorm2d(options.width),
            nn.ReLU(inplace=True),
        ]
        if options.stem == "imagenet":
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)

        bottleneck = options.block == "bottleneck"
        inputs, stages = options.width, []
        for i, depth in enumerate(options.depths):
            width, blocks = options.width * 2**i, []
            for j in range(depth):
                blocks.append(Block(inputs, width, 2 if i > 0 and j == 0 else 1, bottleneck))
                inputs = width * 4 if bottleneck else width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, options.classes)
        self._initialise(options.zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and zero_init_residual:
                nn.init.zeros_(module.branch[-1].get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class ResNet(ImageClassification):
    """Fashion-MNIST with pad-crop-flip; metric ``accuracy``."""

    Model = ResNetModel
    role_patterns: ClassVar = {"stem.0.weight": "stem", "head.weight": "head"}

    def build_model(self) -> nn.Module:
        return Net(self.model_options)
