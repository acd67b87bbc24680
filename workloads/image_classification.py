"""What the image workloads share: Fashion-MNIST on the device, augmentation, loss and accuracy.

A subclass adds a model. Data is normalised once, when it is loaded; a training batch is then one gather.
"""

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
    """Fashion-MNIST; the last `validation_examples` of its training part are held back as validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_examples: int = Field(ge=1, le=50_000)
    """Examples cut from the end of the training part, whose order is random."""
    test_examples: int = Field(ge=1, le=10_000)
    """Leading examples of the official test part that are evaluated."""
    pad: int = Field(ge=0, le=14)
    """Training pictures are shifted by up to this many pixels in each direction."""
    flip: bool
    """Whether half of the training pictures are mirrored."""
    evaluation_batch: int = Field(ge=1)
    """Examples per forward in evaluation."""


class ImageClassification(Workload):
    """Images in, logits [n, classes] out. Batch: ``inputs`` float32 [n, 1, 28, 28], ``labels`` int64 [n]."""

    Data = ImageData

    def load(self, source: str, device: torch.device) -> None:
        arrays, way = fashion_mnist.load(source)
        self._fingerprint = {"source": way, **arrays.hashes()}

        def images(pixels: Tensor) -> Tensor:
            return ((pixels.to(device).float() / 255 - fashion_mnist.MEAN) / fashion_mnist.STD).unsqueeze(1)

        # Copies, because the arrays are views of read-only bytes.
        pictures, labels = torch.from_numpy(arrays.train_images.copy()), torch.from_numpy(arrays.train_labels.copy())
        size = len(pictures) - self.data_options.validation_examples
        test = slice(0, self.data_options.test_examples)
        self._splits = {
            "validation": (images(pictures[size:]), labels[size:].long().to(device)),
            "test": (
                images(torch.from_numpy(arrays.test_images[test].copy())),
                torch.from_numpy(arrays.test_labels[test].copy()).long().to(device),
            ),
        }
        # Padded with black, the pictures' own background.
        pad = self.data_options.pad
        self._pictures = images(F.pad(pictures[:size], (pad, pad, pad, pad)))
        self._labels = labels[:size].long().to(device)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    @property
    def train_size(self) -> int:
        return len(self._labels)

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Pad-crop-flip: bit 0 of the key mirrors, bits 1-20 choose the row and bits 21-40 the column."""
        device, shifts = self._labels.device, 2 * self.data_options.pad + 1
        indices, keys = indices.to(device, non_blocking=True), keys.to(device, non_blocking=True)
        height, width = (side - shifts + 1 for side in self._pictures.shape[-2:])
        rows = ((keys >> 1 & 0xFFFFF) % shifts)[:, None] + torch.arange(height, device=device)
        columns = ((keys >> 21 & 0xFFFFF) % shifts)[:, None] + torch.arange(width, device=device)
        if self.data_options.flip:
            columns = torch.where((keys & 1).bool()[:, None], columns.flip(1), columns)
        channels = torch.arange(self._pictures.shape[1], device=device)
        # One gather [n, channels, height, width].
        inputs = self._pictures[
            indices[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
        return {"inputs": inputs, "labels": self._labels[indices]}

    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(outputs.detach().float().softmax(-1), 1, generator=generator).squeeze(1)

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        inputs, labels = (part.split(self.data_options.evaluation_batch) for part in self._splits[split])
        for x, y in zip(inputs, labels, strict=True):
            yield {"inputs": x, "labels": y}

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        labels = batch["labels"]
        return {
            "accuracy": (outputs.argmax(-1) == labels).sum(),
            "loss": self.loss(outputs, batch, reduction="none").sum(),
            "num_examples": torch.tensor(len(labels), device=labels.device),
        }
