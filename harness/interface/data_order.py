"""The order of the training examples: which ones a step takes, and the random bits of their augmentation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.seeding import TrialSeeds, splitmix64

_MASK63 = np.uint64(2**63 - 1)


class Selection(NamedTuple):
    """The examples of one step."""

    indices: Tensor
    """Which examples: int64 [n] on the CPU, in [0, train_size)."""
    keys: Tensor
    """63 random bits for each, which decide its augmentation: int64 [n] on the CPU, in [0, 2**63)."""


def plain_selection(selection: Selection) -> Selection:
    """The selection that a submission returned, read once, as plain tensors; raises ValueError for one that no step can
    take.

    An object whose length changes between two looks would train on more examples than are counted.
    """
    indices, keys = selection.indices, selection.keys
    for name, value in (("indices", indices), ("keys", keys)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1 or not value.shape[0]:
            raise ValueError(f"select() returned {name} that are no int64 tensor [n] with n > 0: {value!r}")
    indices, keys = indices.as_subclass(Tensor), keys.as_subclass(Tensor)
    if indices.shape != keys.shape:
        raise ValueError(f"select() returned {indices.shape[0]} indices and {keys.shape[0]} keys")
    return Selection(indices, keys)


class ExampleStream:
    """The default data order: epoch after epoch of random permutations, as one endless stream.

    A pure function of (seed, position in the stream). The batch size changes where the stream is cut and nothing else.
    Its whole state is `position`, the number of examples taken so far.
    """

    def __init__(self, seeds: TrialSeeds, train_size: int) -> None:
        self._seeds = seeds
        self._size = train_size
        self._key_base = np.uint64(seeds.key("augmentation"))
        # Permutations by epoch. Two are kept, since making one takes time in proportion to the training set, and near
        # the end of an epoch both the batch and the ones that are read ahead are asked for in turn.
        self._orders: dict[int, Tensor] = {}
        self.position = 0

    def take(self, count: int) -> Selection:
        """The next `count` examples; moves `position` past them."""
        selection = self.peek(self.position, count)
        self.position += count
        return selection

    def peek(self, position: int, count: int) -> Selection:
        """The `count` examples from `position` on, without moving."""
        return Selection(self._indices(position, count), self._keys(position, count))

    def _indices(self, position: int, count: int) -> Tensor:
        # One batch may span several epochs: the end of one, or all of a small training set.
        pieces = []
        while count:
            epoch, offset = divmod(position, self._size)
            piece = self._permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            position, count = position + len(piece), count - len(piece)
        return torch.cat(pieces)

    def _keys(self, position: int, count: int) -> Tensor:
        positions = np.arange(position, position + count, dtype=np.uint64)
        return torch.from_numpy((splitmix64(splitmix64(positions) ^ self._key_base) & _MASK63).astype(np.int64))

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            # A generator per epoch: any position can be read without drawing the epochs before it.
            generator = torch.Generator().manual_seed(self._seeds.key("order", epoch))
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = torch.randperm(self._size, generator=generator)
        return self._orders[epoch]
