"""What image classification workloads share: the data, its augmentation, the loss and the metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harness.workload import Batch, Split, Workload
from workloads.data import fashion_mnist


class ImageData(BaseModel):
    """Options of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_size: int = Field(ge=1, lt=60_000)
    """Images cut from the end of the training part."""
    pad: int = Field(ge=0, le=8)
    """Augmentation: pad by this many zeros on each side, crop back at random."""
    flip: bool
    """Augmentation: mirror left-right half of the time."""
    evaluation_batch: int = Field(ge=1)
    """Images per forward of an evaluation."""


class ImageClassification(Workload):
    Data = ImageData

    def load(self, source: str, device: torch.device) -> None:
        options: ImageData = self.data_options
        name, splits = fashion_mnist.load(source)
        source = name if name in fashion_mnist.SOURCES else "folder"  # a path is nobody else's business
        hashes = {split: images.sha256 for split, images in splits.items()}
        self._fingerprint = {"name": "fashion-mnist", "source": source} | hashes
        images, labels = (torch.from_numpy(array.copy()) for array in splits["train"])
        cut = len(labels) - options.validation_size
        mean, deviation = _statistics(images[:cut])

        def prepared(raw: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            return ((raw.float() - mean) / deviation).unsqueeze(1).to(device), classes.long().to(device)

        self._train_images, self._train_labels = prepared(images[:cut], labels[:cut])
        # Padding at load time: cropping is then one gather.
        self._train_images = F.pad(self._train_images, [options.pad] * 4)
        self._held_back = {
            "validation": prepared(images[cut:], labels[cut:]),
            "test": prepared(*(torch.from_numpy(array.copy()) for array in splits["test"])),
        }
        self._device = device

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    @property
    def train_size(self) -> int:
        return len(self._train_labels)

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """inputs: float [n, 1, 28, 28], labels: int64 [n]. A key's bits 0-15 give the row, 16-31 the column of the
        crop and bit 32 the mirroring."""
        options: ImageData = self.data_options
        indices, keys = indices.to(self._device), keys.to(self._device)
        size, shifts = self._train_images.shape[-1] - 2 * options.pad, 2 * options.pad + 1
        span = torch.arange(size, device=self._device)
        rows = (keys & 0xFFFF).remainder(shifts)[:, None] + span
        columns = (keys >> 16 & 0xFFFF).remainder(shifts)[:, None] + span
        if options.flip:
            columns = torch.where((keys >> 32 & 1).bool()[:, None], columns.flip(1), columns)
        images = self._train_images[:, 0][indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        return {"inputs": images.unsqueeze(1), "labels": self._train_labels[indices]}

    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(outputs.float().softmax(-1), 1, generator=generator).squeeze(1)

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        images, labels = self._held_back[split]
        size = self.data_options.evaluation_batch
        for piece, classes in zip(images.split(size), labels.split(size), strict=True):
            yield {"inputs": piece, "labels": classes}

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """accuracy (share of images right) and loss (nats per image)."""
        labels = batch["labels"]
        return {
            "accuracy": (outputs.argmax(-1) == labels).sum(),
            "loss": F.cross_entropy(outputs.float(), labels, reduction="sum"),
            "num_examples": torch.tensor(len(labels)),
        }


def _statistics(images: Tensor) -> tuple[float, float]:
    """Mean and deviation of the pixels, in float64 from integer sums: the same on every machine."""
    values = images.reshape(-1).to(torch.int64)
    mean = values.sum().item() / values.numel()
    return mean, (values.square().sum().item() / values.numel() - mean**2) ** 0.5
