"""All randomness of a trial, as pure functions of what it is for.

Nothing in a trial draws from a generator whose state depends on what ran before. Each use has its own key, derived from
the trial's seed by a stable hash, so that two submissions with one seed see the same initial weights, the same examples
in the same order, with the same augmentation and the same dropout masks, and so that a resumed trial needs no
generator state except the submission's own.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MASK63 = np.uint64(2**63 - 1)


def stable_hash(*parts: str | int) -> int:
    """63-bit hash of the parts: the same on every machine, in every process, for every Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Vectorised 64-bit mixer (Steele, Lea & Flood 2014, SplitMix); uint64 in, uint64 out, shape kept."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrialSeeds:
    """The keys of one trial, from its study seed and trial number."""

    def __init__(self, study_seed: int, trial: int) -> None:
        self.base = stable_hash("pacemark", study_seed, trial)

    def key(self, purpose: str, *position: int) -> int:
        return stable_hash(self.base, purpose, *position)

    def seed_model_randomness(self, step: int, micro_batch: int) -> None:
        """Dropout and the like: torch's global generators, keyed by (seed, step, micro-batch)."""
        seed = int(splitmix64(np.array([self._dropout_base ^ (step * 65_537 + micro_batch)], dtype=np.uint64))[0] >> 1)
        # torch.manual_seed would visit every kind of accelerator: 0.1 ms, on the clock of every step.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)

    def seed_labels(self, generator: torch.Generator, step: int, forward: int, micro_batch: int) -> None:
        """For labels drawn from the model's predictions, in the `forward`-th pass of a step."""
        generator.manual_seed(self.key("labels", step, forward, micro_batch))

    @property
    def _dropout_base(self) -> int:
        if not hasattr(self, "_dropout"):
            self._dropout = self.key("dropout")
        return self._dropout


class Selection(NamedTuple):
    """Examples of one step: which ones, and the random bits that decide their augmentation."""

    indices: Tensor
    """int64 [n], CPU, in [0, train_size)."""
    keys: Tensor
    """int64 [n], CPU, in [0, 2**63)."""


class ExampleStream:
    """The default data order: epoch after epoch of random permutations, cut anywhere.

    A pure function of (seed, position), so the batch size changes where the stream is cut and nothing else. Its whole
    state is `position`, the number of examples taken.
    """

    def __init__(self, seeds: TrialSeeds, train_size: int) -> None:
        self._seeds = seeds
        self._size = train_size
        self._key_base = np.uint64(seeds.key("augmentation"))
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def take(self, count: int) -> Selection:
        """The next `count` examples."""
        selection = Selection(self.indices_at(self.position, count), self.keys_at(self.position, count))
        self.position += count
        return selection

    def indices_at(self, position: int, count: int) -> Tensor:
        pieces = []
        while count:
            epoch, offset = divmod(position, self._size)
            piece = self._permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            position, count = position + len(piece), count - len(piece)
        return torch.cat(pieces)

    def keys_at(self, position: int, count: int) -> Tensor:
        positions = np.arange(position, position + count, dtype=np.uint64)
        return torch.from_numpy((splitmix64(splitmix64(positions) ^ self._key_base) & _MASK63).astype(np.int64))

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seeds.key("order", epoch))
            self._order, self._epoch = torch.randperm(self._size, generator=generator), epoch
        return self._order
