"""ImageNet's pictures, decoded as they are needed by as many processes as the machine has cores, ahead of time where
the harness says what comes next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from harness.interface import Batch, Split
from harness.seeding import splitmix64
from workloads.data.decoding import DRAWS, Augmentation, Decoders
from workloads.data.imagenet import Pictures
from workloads.data.read_ahead import ReadAhead

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Of ImageNet's pixels per channel, the values in everyone's use."""

Host = tuple[Tensor, Tensor]
"""uint8 [n, size, size, 3] and int64 [n], pinned where there is a GPU."""


class StreamedImages:
    """The first `test_size` training pictures by number are the split `test`, the rest is for training."""

    def __init__(
        self,
        splits: Mapping[str, Pictures],
        test_size: int,
        *,
        image: int,
        resize: int,
        augmentation: Augmentation,
        lookahead: int,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self._splits, self._test_size, self._device = splits, test_size, device
        self._decoders = Decoders(image, resize, augmentation, workers)
        self._training = ReadAhead(self._read_training, lookahead, device)
        self._evaluation = ReadAhead(self._read_evaluation, 2, device)
        self._mean = torch.tensor(MEAN, device=device)
        self._deviation = torch.tensor(DEVIATION, device=device)

    def __len__(self) -> int:
        return len(self._splits["train"]) - self._test_size

    def hint(self, indices: Tensor, keys: Tensor) -> None:
        self._training.hint(indices, keys)

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """inputs: float [n, 3, image, image] in channels-last order, labels: int64 [n]."""
        return self._on_device(self._training.take(indices, keys))

    def evaluation_batches(self, split: Split, size: int, part: slice = slice(None)) -> Iterator[Batch]:
        count = self._test_size if split == "test" else len(self._splits["validation"])
        which = torch.tensor(["validation", "test"].index(split))
        pieces = torch.arange(count).split(size)[part]
        for i, piece in enumerate(pieces):
            for later in pieces[i : i + 2]:
                self._evaluation.hint(later, which)
            yield self._on_device(self._evaluation.take(piece, which))

    def _read_training(self, indices: Tensor, keys: Tensor) -> Host:
        return self._read("train", indices.numpy() + self._test_size, uniform(keys.numpy(), DRAWS))

    def _read_evaluation(self, positions: Tensor, which: Tensor) -> Host:
        return self._read("train" if which else "validation", positions.numpy(), None)

    def _read(self, split: str, positions: np.ndarray, draws: np.ndarray | None) -> Host:
        pictures = self._splits[split]
        pixels = torch.from_numpy(self._decoders.pixels(pictures.blobs(positions), draws))
        labels = torch.from_numpy(pictures.labels[positions])
        return (pixels.pin_memory(), labels.pin_memory()) if self._device.type == "cuda" else (pixels, labels)

    def _on_device(self, host: Host) -> Batch:
        pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in host)
        inputs = ((pixels.float() - self._mean) / self._deviation).permute(0, 3, 1, 2)
        return {"inputs": inputs, "labels": labels}


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count] in [0, 1), a pure function of each key (int64 [n])."""
    start = splitmix64(keys.astype(np.uint64))[:, None] + np.arange(count, dtype=np.uint64)
    return (splitmix64(start) >> np.uint64(11)) * 2.0**-53
