"""Reading batches before they are asked for, in threads. What is read depends on what is asked for, never on when."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Keeps up to `depth` reads under way. Hints that nobody takes up make room for later ones."""

    def __init__(self, read: Callable[[Tensor, Tensor], T], depth: int, device: torch.device) -> None:
        self._read, self._depth = read, depth
        self._pending: dict[bytes, Future[T]] = {}
        # A thread begins on the first GPU, where pinning memory would open a context of its own.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(depth, "read-ahead", begin)

    def hint(self, indices: Tensor, keys: Tensor) -> None:
        """This batch will probably be taken soon."""
        name = _name(indices, keys)
        if name in self._pending:
            return
        while len(self._pending) >= self._depth:
            self._pending.pop(next(iter(self._pending))).cancel()
        self._pending[name] = self._threads.submit(self._read, indices, keys)

    def take(self, indices: Tensor, keys: Tensor) -> T:
        """The batch, read now unless a hint had it read before. Raises what reading it raised."""
        future = self._pending.pop(_name(indices, keys), None)
        return self._read(indices, keys) if future is None else future.result()


def _name(indices: Tensor, keys: Tensor) -> bytes:
    return indices.numpy().tobytes() + keys.numpy().tobytes()
