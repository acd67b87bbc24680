"""The shipped workloads on random data of their real shapes, which need no files: for measuring time, not learning."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from harness.config.schema import Run
from harness.interface import Batch, Workload
from workloads.data.device_images import DeviceImages
from workloads.gpt2 import GPT2
from workloads.image_classification import ImageClassification
from workloads.resnet import ResNet
from workloads.vit import ViT

TOKENS = 2_000_000
"""Of the random text."""


class SyntheticText(GPT2):
    """GPT-2 on random tokens, which lie on the device."""

    @override
    def load(self, source: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._device, self._fingerprint = device, {"name": "synthetic"}
        self._train = torch.randint(self.model_options.vocabulary, (TOKENS,), generator=generator).to(device)
        self._evaluation_windows = {"validation": self._spread_windows(self._train)}

    @property
    @override
    def lookahead(self) -> int:
        # The text is on the device at every scale.
        return 0


class _SyntheticImages(ImageClassification):
    """Random images on the device: of Fashion-MNIST's number and size, or one batch of ImageNet's or CIFAR's."""

    @override
    def load(self, source: str, device: torch.device) -> None:
        random = np.random.default_rng(0)
        options, classes = self.data_options, self.model_options.classes
        self._device, self._fingerprint = device, {"name": "synthetic"}
        count: int = self.spec.nominal_batch
        shape: tuple[int, ...] = (options.image or 32, options.image or 32, 3)
        if options.dataset == "fashion-mnist":
            count, shape = 60_000 - options.validation_size, (28, 28)
        train = random.integers(0, 256, (count, *shape), np.uint8), random.integers(0, classes, count)
        evaluation = {"validation": (train[0][:64], train[1][:64])}
        self._images = DeviceImages(train, evaluation, pad=options.pad, flip=options.flip, device=device)

    @property
    @override
    def lookahead(self) -> int:
        return 0


class SyntheticResNet(_SyntheticImages, ResNet):
    """The ResNet workload on random images."""


class SyntheticViT(_SyntheticImages, ViT):
    """The ViT workload on random images."""


def load_synthetic(run: Run, device: torch.device) -> Workload:
    """The workload of `run` with random data on `device`."""
    classes: dict[str, type[Workload]] = {"gpt2": SyntheticText, "resnet": SyntheticResNet, "vit": SyntheticViT}
    workload = classes[run.spec.name](run.spec)
    workload.load("synthetic", device)
    return workload


def examples(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a workload's batch."""
    return batch["inputs"], batch["labels"]
