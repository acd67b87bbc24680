"""Pictures that fit the device: held there whole, cropped and mirrored there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.interface import Batch, Split

Pair = tuple[np.ndarray, np.ndarray]
"""uint8 [n, h, w] or [n, h, w, channels], and labels [n]."""


class DeviceImages:
    """Normalised with the statistics of the training pictures, per channel."""

    def __init__(
        self, train: Pair, held_back: Mapping[str, Pair], *, pad: int, flip: bool, device: torch.device
    ) -> None:
        images = torch.from_numpy(np.array(train[0]))
        mean, deviation = _statistics(images)

        def prepared(raw: np.ndarray, classes: np.ndarray) -> tuple[Tensor, Tensor]:
            pixels = (torch.from_numpy(np.array(raw)).float() - mean) / deviation
            return pixels.to(device), torch.from_numpy(np.array(classes)).long().to(device)

        pixels, self._labels = prepared(*train)
        # Padding at load time: cropping is then one gather.
        sides = [pad] * 4 if pixels.ndim == 3 else [0, 0] + [pad] * 4
        self._images = F.pad(pixels, sides)
        self._held_back = {split: prepared(*pair) for split, pair in held_back.items()}
        self._pad, self._flip, self._device = pad, flip, device

    def __len__(self) -> int:
        return len(self._labels)

    def hint(self, indices: Tensor, keys: Tensor) -> None:
        """Nothing is waited for here."""

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """inputs: float [n, channels, h, w], labels: int64 [n]. A key's bits 0-15 give the row, 16-31 the column of the
        crop and bit 32 the mirroring."""
        indices, keys = indices.to(self._device), keys.to(self._device)
        size, shifts = self._images.shape[1] - 2 * self._pad, 2 * self._pad + 1
        span = torch.arange(size, device=self._device)
        rows = (keys & 0xFFFF).remainder(shifts)[:, None] + span
        columns = (keys >> 16 & 0xFFFF).remainder(shifts)[:, None] + span
        if self._flip:
            columns = torch.where((keys >> 32 & 1).bool()[:, None], columns.flip(1), columns)
        images = self._images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        return {"inputs": _channels_second(images), "labels": self._labels[indices]}

    def evaluation_batches(self, split: Split, size: int, part: slice = slice(None)) -> Iterator[Batch]:
        images, labels = self._held_back[split]
        for piece, classes in zip(images.split(size)[part], labels.split(size)[part], strict=True):
            yield {"inputs": _channels_second(piece), "labels": classes}


def _channels_second(images: Tensor) -> Tensor:
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _statistics(images: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels, in float64 from integer sums: the same on every machine."""
    if images.ndim == 4:
        channels = [_statistics(images[..., c]) for c in range(images.shape[3])]
        means, deviations = (torch.tensor([float(channel[i]) for channel in channels]) for i in range(2))
        return means, deviations
    values = images.reshape(-1).to(torch.int64)
    mean = values.sum().item() / values.numel()
    return mean, (values.square().sum().item() / values.numel() - mean**2) ** 0.5
