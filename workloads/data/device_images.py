"""Images that fit into the device's memory: all are kept there, and cropped and mirrored there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.interface import Batch, Split, to_device

ImagesAndLabels = tuple[np.ndarray, np.ndarray]
"""uint8 [n, h, w] or [n, h, w, channels], and labels [n]."""


class DeviceImages:
    """Training images and evaluation splits, normalised per channel with the statistics of the training images.

    pad: augmentation by random crops after padding with so many zeros on each side. flip: augmentation by mirroring.
    """

    def __init__(
        self,
        train: ImagesAndLabels,
        evaluation: Mapping[str, ImagesAndLabels],
        *,
        pad: int,
        flip: bool,
        device: torch.device,
    ) -> None:
        images = torch.from_numpy(np.array(train[0]))
        mean, deviation = _pixel_statistics(images)

        def normalise(raw: np.ndarray, classes: np.ndarray) -> tuple[Tensor, Tensor]:
            pixels = (torch.from_numpy(np.array(raw)).float() - mean) / deviation
            return pixels.to(device), torch.from_numpy(np.array(classes)).long().to(device)

        pixels, self._labels = normalise(*train)
        # Padded once, so that a random crop is a single gather.
        sides = [pad] * 4 if pixels.ndim == 3 else [0, 0] + [pad] * 4
        self._images = F.pad(pixels, sides)
        self._crops = _crop_views(self._images, 2 * pad + 1)
        self._evaluation = {split: normalise(*pair) for split, pair in evaluation.items()}
        self._pad, self._flip, self._device = pad, flip, device

    def __len__(self) -> int:
        return len(self._labels)

    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        """Do nothing: all images are on the device."""

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Augmented training images. inputs: float [n, channels, h, w], labels: int64 [n].

        The bits 0-15 of a key give the row of the crop, 16-31 its column, and bit 32 the mirroring.
        """
        shifts = 2 * self._pad + 1
        rows, columns = (keys & 0xFFFF).remainder(shifts), (keys >> 16 & 0xFFFF).remainder(shifts)
        # One copy for all four.
        indices, rows, columns, mirrored = to_device(
            torch.stack([indices, rows, columns, keys >> 32 & 1]), self._device
        ).unbind()
        images = self._crops[indices, rows, columns] if self._pad else self._images.index_select(0, indices)
        if self._flip:
            images = torch.where(mirrored.bool().view(-1, *[1] * (images.ndim - 1)), images.flip(2), images)
        return {"inputs": _move_channels_first(images), "labels": self._labels.index_select(0, indices)}

    def discard_held_back(self) -> None:
        """Forget the evaluation splits."""
        self._evaluation = {}

    def evaluation_batches(self, split: Split, size: int, part: slice = slice(None)) -> Iterator[Batch]:
        """The batches of an evaluation split. size: images per batch. part: which of the batches, by number."""
        images, labels = self._evaluation[split]
        for inputs, classes in zip(images.split(size)[part], labels.split(size)[part], strict=True):
            yield {"inputs": _move_channels_first(inputs), "labels": classes}


def _crop_views(images: Tensor, shifts: int) -> Tensor:
    """All crops of all images, which share their memory: [n, row, column, h, w] or [n, row, column, h, w, channels]."""
    count, height, width, *channels = images.shape
    per_image, per_row, per_column, *per_channel = images.stride()
    return images.as_strided(
        (count, shifts, shifts, height - shifts + 1, width - shifts + 1, *channels),
        (per_image, per_row, per_column, per_row, per_column, *per_channel),
    )


def _move_channels_first(images: Tensor) -> Tensor:
    """[n, h, w] or [n, h, w, channels] as [n, channels, h, w], a view."""
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _pixel_statistics(images: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels, for colour images float [channels].

    Computed in float64 from integer sums, so that they are the same on every machine.
    """
    if images.ndim == 4:
        channels = [_pixel_statistics(images[..., c]) for c in range(images.shape[3])]
        means, deviations = (torch.tensor([float(channel[i]) for channel in channels]) for i in range(2))
        return means, deviations
    # By how often each of the 256 values occurs: squares of all pixels would be 8 bytes each.
    counts, values = torch.bincount(images.reshape(-1), minlength=256), torch.arange(256)
    mean = (counts * values).sum().item() / images.numel()
    return mean, ((counts * values.square()).sum().item() / images.numel() - mean**2) ** 0.5
