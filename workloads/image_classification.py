"""What image classification workloads share: the data, its augmentation, the loss and the metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import betaincinv
from torch import Tensor
from typing_extensions import override

from harness.errors import PreparationError
from harness.interface import Batch, Split, Workload, WorkloadError
from workloads.data import cifar10, fashion_mnist, imagenet, prepared
from workloads.data.decoding import Augmentation
from workloads.data.device_images import DeviceImages
from workloads.data.streamed_images import StreamedImages, uniform


class ImageData(BaseModel):
    """Options of the data. `validation_size` and `pad` are for pictures that fit the device (fashion-mnist, cifar10),
    `test_size`, `image`, `resize`, `min_area` and RandAugment's for those that do not (imagenet)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["fashion-mnist", "cifar10", "imagenet"] = "fashion-mnist"
    validation_size: int | None = Field(default=None, ge=1, lt=60_000)
    """Images cut from the end of the training part."""
    pad: int = Field(default=0, ge=0, le=8)
    """Augmentation: pad by this many zeros on each side, crop back at random."""
    flip: bool
    """Augmentation: mirror left-right half of the time."""
    evaluation_batch: int = Field(ge=1)
    """Images per forward of an evaluation."""
    test_size: int | None = Field(default=None, ge=1)
    """Training images held back for the test."""
    image: int | None = Field(default=None, ge=1)
    """Height and width of what the model sees."""
    resize: int | None = Field(default=None, ge=1)
    """Evaluation: shorter side before the centre is cut out."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Augmentation: smallest share of an image's area that is cut out."""
    randaugment: int = Field(default=0, ge=0, le=2)
    """Augmentation: operations of RandAugment."""
    randaugment_level: int = Field(default=10, ge=0, le=10)
    mixup: float = Field(default=0.0, ge=0)
    """Augmentation: each image is mixed with another of its micro-batch in a share drawn, per micro-batch, from
    Beta(mixup, mixup) (Zhang et al. 2018, arXiv:1710.09412); 0 for none."""

    @model_validator(mode="after")
    def _belongs(self) -> ImageData:
        needed = ("test_size", "image", "resize") if self.dataset == "imagenet" else ("validation_size",)
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing; dataset={self.dataset} needs it")
        if self.image is not None and self.resize is not None and self.resize < self.image:
            raise ValueError(f"resize={self.resize} must be at least image={self.image}, which is cut out of it")
        return self


class ImageClassification(Workload):
    Data = ImageData
    _images: DeviceImages | StreamedImages

    @override
    def load(self, source: str, device: torch.device) -> None:
        options: ImageData = self.data_options
        self._device = device
        try:
            if options.dataset == "fashion-mnist":
                self._load_fashion_mnist(source)
            elif options.dataset == "cifar10":
                self._load_cifar10(source)
            else:
                self._load_imagenet(source)
        except PreparationError as error:
            raise WorkloadError(str(error)) from error

    def _load_fashion_mnist(self, source: str) -> None:
        name, splits = fashion_mnist.load(source)
        source = name if name in fashion_mnist.SOURCES else "folder"  # a path is nobody else's business
        hashes = {split: images.sha256 for split, images in splits.items()}
        self._fingerprint = {"name": "fashion-mnist", "source": source} | hashes
        self._keep({split: (images.images, images.labels) for split, images in splits.items()})

    def _load_cifar10(self, source: str) -> None:
        found, splits = cifar10.load(source)
        self._fingerprint = found.fingerprint
        self._keep({split: (images.images.transpose(0, 2, 3, 1), images.labels) for split, images in splits.items()})

    def _keep(self, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        options: ImageData = self.data_options
        assert options.validation_size is not None
        images, labels = splits["train"]
        cut = len(labels) - options.validation_size
        if cut < 1:
            raise WorkloadError(f"workload.data.validation_size={options.validation_size} leaves nothing of the "
                                f"{len(labels):,} training images; lower it")  # fmt: skip
        held_back = {"validation": (images[cut:], labels[cut:]), "test": splits["test"]}
        augmentation: dict[str, Any] = {"pad": options.pad, "flip": options.flip}
        self._images = DeviceImages((images[:cut], labels[:cut]), held_back, **augmentation, device=self._device)

    def _load_imagenet(self, source: str) -> None:
        options: ImageData = self.data_options
        assert options.test_size is not None and options.image is not None and options.resize is not None
        found, splits = imagenet.load(source)
        if options.test_size >= len(splits["train"]):
            raise WorkloadError(f"workload.data.test_size={options.test_size} leaves nothing of the "
                                f"{len(splits['train']):,} training images; lower it")  # fmt: skip
        most = max(int(split.labels.max()) for split in splits.values())
        if (classes := self.model_options.classes) <= most:
            raise WorkloadError(f"workload.model.classes={classes}: the labels go up to {most}; set it to 1000")
        self._fingerprint = found.fingerprint
        self._images = StreamedImages(
            splits,
            options.test_size,
            image=options.image,
            resize=options.resize,
            augmentation=Augmentation(options.min_area, options.flip, options.randaugment, options.randaugment_level),
            lookahead=self.lookahead,
            device=self._device,
        )

    @classmethod
    @override
    def missing_data(cls, data: dict[str, Any], source: str) -> str:
        dataset = data.get("dataset", "fashion-mnist")
        return "" if dataset == "fashion-mnist" else prepared.missing_data(dataset, source)

    @property
    @override
    def lookahead(self) -> int:
        return 2 if self.data_options.dataset == "imagenet" else 0

    @property
    @override
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    @property
    @override
    def train_size(self) -> int:
        return len(self._images)

    @override
    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        self._images.hint(indices, keys)

    @override
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """inputs: float [n, channels, h, w]; labels: int64 [n], or with mixup float [n, classes], their shares."""
        batch = self._images.batch(indices, keys)
        return self._mixed(batch, keys) if self.data_options.mixup else batch

    def _mixed(self, batch: Batch, keys: Tensor) -> Batch:
        """Each image with the next of its micro-batch; the micro-batch's first key gives the share."""
        micro, count = self.spec.micro_batch, len(keys)
        shares = np.repeat(mixing_shares(keys[::micro].numpy(), self.data_options.mixup), micro)[:count]
        own = torch.from_numpy(shares).float().to(self._device)
        position = torch.arange(count)
        first = position // micro * micro
        size = (count - first).clamp(max=micro)
        other = (first + (position - first + 1) % size).to(self._device)
        inputs, labels = batch["inputs"], F.one_hot(batch["labels"], self.model_options.classes).float()
        weight = own[:, None, None, None]
        return {
            "inputs": weight * inputs + (1 - weight) * inputs[other],
            "labels": own[:, None] * labels + (1 - own[:, None]) * labels[other],
        }

    @override
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    @override
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """int64 [n]."""
        return torch.multinomial(outputs.float().softmax(-1), 1, generator=generator).squeeze(1)

    @override
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        yield from self._images.evaluation_batches(split, self.data_options.evaluation_batch, part)

    @override
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """accuracy (share of images right) and loss (nats per image)."""
        labels = batch["labels"]
        return {
            "accuracy": (outputs.argmax(-1) == labels).sum(),
            "loss": F.cross_entropy(outputs.float(), labels, reduction="sum"),
            "num_examples": torch.tensor(len(labels)),
        }


MIXUP = 0x6D6978
"""Sets the shares' random numbers apart from those of the crops, which come from the same keys."""


def mixing_shares(keys: np.ndarray, alpha: float) -> np.ndarray:
    """float64 [n] from Beta(alpha, alpha), a pure function of each key (int64 [n])."""
    return betaincinv(alpha, alpha, uniform(keys ^ MIXUP, 1)[:, 0])
