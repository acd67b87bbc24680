"""ImageNet's pictures, decoded when they are needed by as many processes as the machine has cores.

Batches that the harness announces are decoded ahead of time.
"""

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
"""Mean and standard deviation of ImageNet's pixels per channel, the commonly used values."""

HostBatch = tuple[Tensor, Tensor]
"""Pixels uint8 [n, size, size, 3] and labels int64 [n] on the CPU, in pinned memory where there is a GPU."""


class StreamedImages:
    """Training and evaluation batches of prepared pictures.

    The first `test_size` training pictures by number are the split `test`, the others are for training. image, resize:
    see `decoding.evaluation_pixels`. lookahead: batches that are decoded ahead. workers: decoding processes (default:
    one per core).
    """

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

    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        """Start to decode a training batch. Returns at once."""
        self._training.prefetch(indices, keys)

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Augmented training pictures. inputs: float [n, 3, image, image] in channels-last order, labels: int64 [n]."""
        return self._to_device(self._training.get(indices, keys))

    def discard_held_back(self) -> None:
        """Forget the validation split. The pictures of the test split are files of the training split's folder, which
        the process can read all the same."""
        self._splits = {"train": self._splits["train"]}

    def evaluation_batches(self, split: Split, size: int, part: slice = slice(None)) -> Iterator[Batch]:
        """The batches of an evaluation split. size: pictures per batch. part: which of the batches, by number."""
        count = self._test_size if split == "test" else len(self._splits["validation"])
        # The split's number, in the place of the keys of a training batch.
        split_number = torch.tensor(["validation", "test"].index(split))
        batches = torch.arange(count).split(size)[part]
        for i, numbers in enumerate(batches):
            for upcoming in batches[i : i + 2]:
                self._evaluation.prefetch(upcoming, split_number)
            yield self._to_device(self._evaluation.get(numbers, split_number))

    def _read_training(self, indices: Tensor, keys: Tensor) -> HostBatch:
        return self._read("train", indices.numpy() + self._test_size, uniform_draws(keys.numpy(), DRAWS))

    def _read_evaluation(self, numbers: Tensor, split_number: Tensor) -> HostBatch:
        return self._read("train" if split_number else "validation", numbers.numpy(), None)

    def _read(self, split: str, numbers: np.ndarray, draws: np.ndarray | None) -> HostBatch:
        """Decode the pictures of a prepared split with these numbers; draws: see `Decoders.load_pixels`."""
        pictures = self._splits[split]
        pixels = torch.from_numpy(self._decoders.load_pixels(pictures.locate(numbers), draws))
        labels = torch.from_numpy(pictures.labels[numbers])
        return (pixels.pin_memory(), labels.pin_memory()) if self._device.type == "cuda" else (pixels, labels)

    def _to_device(self, host: HostBatch) -> Batch:
        # Copied as bytes and normalised there: a quarter of the traffic of float32.
        pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in host)
        inputs = ((pixels.float() - self._mean) / self._deviation).permute(0, 3, 1, 2)
        return {"inputs": inputs, "labels": labels}


def uniform_draws(keys: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers float64 [n, count] in [0, 1), a pure function of each key (int64 [n])."""
    start = splitmix64(keys.astype(np.uint64))[:, None] + np.arange(count, dtype=np.uint64)
    return (splitmix64(start) >> np.uint64(11)) * 2.0**-53
