"""The common base of image classification workloads: data, augmentation, loss and metric."""

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
from harness.interface import Batch, Split, Workload, WorkloadError, sample_classes, to_device
from workloads.data import cifar10, fashion_mnist, imagenet, prepared
from workloads.data.decoding import Augmentation
from workloads.data.device_images import DeviceImages
from workloads.data.streamed_images import StreamedImages, uniform_draws


class ImageData(BaseModel):
    """Options of the data.

    `validation_size` and `pad` are for data sets that fit into the device's memory (fashion-mnist, cifar10);
    `test_size`, `image`, `resize`, `min_area` and RandAugment's options are for imagenet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["fashion-mnist", "cifar10", "imagenet"] = "fashion-mnist"
    validation_size: int | None = Field(default=None, ge=1, lt=60_000)
    """Images of the validation split, from the end of the released training images."""
    pad: int = Field(default=0, ge=0, le=8)
    """Augmentation: pad by this many zeros on each side and crop at random to the original size."""
    flip: bool
    """Augmentation: mirror left-right half of the time."""
    evaluation_batch: int = Field(ge=1)
    """Images per forward of an evaluation."""
    test_size: int | None = Field(default=None, ge=1)
    """Images of the test split, from the released training images."""
    image: int | None = Field(default=None, ge=1)
    """Height and width of the model's inputs."""
    resize: int | None = Field(default=None, ge=1)
    """Evaluation: shorter side before the centre is cropped."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Augmentation: smallest share of an image's area that is cropped."""
    randaugment: int = Field(default=0, ge=0, le=2)
    """Augmentation: number of operations of RandAugment."""
    randaugment_level: int = Field(default=10, ge=0, le=10)
    mixup: float = Field(default=0.0, ge=0)
    """Augmentation: each image is mixed with another one of its micro-batch. The share is drawn for each micro-batch
    from Beta(mixup, mixup) (Zhang et al. 2018, arXiv:1710.09412); 0 for none."""

    @model_validator(mode="after")
    def _check_dataset_options(self) -> ImageData:
        required = ("test_size", "image", "resize") if self.dataset == "imagenet" else ("validation_size",)
        for key in required:
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing; dataset={self.dataset} needs it")
        if self.image is not None and self.resize is not None and self.resize < self.image:
            raise ValueError(
                f"resize={self.resize} must be at least image={self.image}, the size of the crop; raise it"
            )
        return self


class ImageClassification(Workload):
    """Image classification on any of the data sets. A subclass defines the model."""

    Data = ImageData
    loss_type = "softmax_cross_entropy"
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
        name, splits = fashion_mnist.load_splits(source)
        # The path of a folder is not recorded.
        source = name if name in fashion_mnist.SOURCES else "folder"
        # Which `load_splits` has compared with those of the data.
        self._fingerprint = {"name": "fashion-mnist", "source": source} | fashion_mnist.SHA256
        self._move_to_device({split: (images.images, images.labels) for split, images in splits.items()})

    def _load_cifar10(self, source: str) -> None:
        data, splits = cifar10.load_splits(source)
        self._fingerprint = data.fingerprint
        # From [n, channels, h, w] to [n, h, w, channels].
        self._move_to_device(
            {split: (images.images.transpose(0, 2, 3, 1), images.labels) for split, images in splits.items()}
        )

    def _move_to_device(self, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Cut the validation split from the end of `train`, and move all splits to the device."""
        options: ImageData = self.data_options
        assert options.validation_size is not None
        images, labels = splits["train"]
        train_size = len(labels) - options.validation_size
        if train_size < 1:
            raise WorkloadError(f"workload.data.validation_size={options.validation_size} leaves nothing of the "
                                f"{len(labels):,} training images; lower it")  # fmt: skip
        train = (images[:train_size], labels[:train_size])
        evaluation = {"validation": (images[train_size:], labels[train_size:]), "test": splits["test"]}
        self._images = DeviceImages(train, evaluation, pad=options.pad, flip=options.flip, device=self._device)

    def _load_imagenet(self, source: str) -> None:
        options: ImageData = self.data_options
        assert options.test_size is not None and options.image is not None and options.resize is not None
        data, splits = imagenet.load_splits(source)
        if options.test_size >= len(splits["train"]):
            raise WorkloadError(f"workload.data.test_size={options.test_size} leaves nothing of the "
                                f"{len(splits['train']):,} training images; lower it")  # fmt: skip
        largest_label = max(int(split.labels.max()) for split in splits.values())
        if (classes := self.model_options.classes) <= largest_label:
            raise WorkloadError(
                f"workload.model.classes={classes}: the labels go up to {largest_label}; set it to 1000"
            )
        self._fingerprint = data.fingerprint
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
    def discard_held_back(self) -> None:
        self._images.discard_held_back()

    @override
    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        self._images.prefetch(indices, keys)

    @override
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """As `Workload.batch`; inputs float [n, channels, h, w].

        labels: int64 [n], or with mixup float [n, classes], the shares of the classes.
        """
        batch = self._images.batch(indices, keys)
        return self._apply_mixup(batch, keys) if self.data_options.mixup else batch

    def _apply_mixup(self, batch: Batch, keys: Tensor) -> Batch:
        """Mix each image with the next one of its micro-batch; the first key of a micro-batch decides its share."""
        # The last micro-batch may be smaller than the others.
        micro, count = self.spec.micro_batch, len(keys)
        # By micro-batch and not by batch, so that a rank needs no images but those of its own micro-batches.
        shares = np.repeat(mixup_shares(keys[::micro].numpy(), self.data_options.mixup), micro)[:count]
        share = to_device(torch.from_numpy(shares).float(), self._device)
        position = torch.arange(count)
        first = position // micro * micro
        size = (count - first).clamp(max=micro)
        partner = to_device(first + (position - first + 1) % size, self._device)
        inputs, labels = batch["inputs"], F.one_hot(batch["labels"], self.model_options.classes).float()
        image_share, label_share = share[:, None, None, None], share[:, None]
        return {
            "inputs": image_share * inputs + (1 - image_share) * inputs[partner],
            "labels": label_share * labels + (1 - label_share) * labels[partner],
        }

    @override
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """As `Workload.loss`: the cross-entropy in nats per image."""
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    @override
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """As `Workload.sample_labels`; int64 [n]."""
        return sample_classes(outputs.float().softmax(-1), generator)

    @override
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        yield from self._images.evaluation_batches(split, self.data_options.evaluation_batch, part)

    @override
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As `Workload.evaluation_sums`, for `accuracy` (share of correct images) and `loss` (nats per image)."""
        labels = batch["labels"]
        return {
            "accuracy": (outputs.argmax(-1) == labels).sum(),
            "loss": F.cross_entropy(outputs.float(), labels, reduction="sum"),
            "num_examples": torch.tensor(len(labels)),
        }


MIXUP_SALT = 0x6D6978
"""Makes the random numbers of the shares independent of those of the crops, which use the same keys."""


def mixup_shares(keys: np.ndarray, alpha: float) -> np.ndarray:
    """Shares float64 [n] from Beta(alpha, alpha), a pure function of each key (int64 [n])."""
    # The inverse of the distribution function at uniform numbers.
    return betaincinv(alpha, alpha, uniform_draws(keys ^ MIXUP_SALT, 1)[:, 0])
