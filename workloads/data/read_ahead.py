"""Reading batches ahead of time, in threads. Prefetching never changes the content of a batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Up to `depth` prefetched batches of `read(indices, keys)`; the oldest unused ones are dropped for new ones.

    indices, keys: tensors on the CPU, which identify a batch.
    """

    def __init__(self, read: Callable[[Tensor, Tensor], T], depth: int, device: torch.device) -> None:
        self._read, self._depth = read, depth
        self._pending: dict[bytes, Future[T]] = {}
        # A new thread uses the first GPU, on which pinning memory would create another context.
        initializer = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(depth, "read-ahead", initializer)

    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        """Start to read this batch in a thread, unless it is pending already. Returns at once."""
        batch_id = _batch_id(indices, keys)
        if batch_id in self._pending:
            return
        # Dicts keep the order of insertion, so the first one is the oldest.
        while len(self._pending) >= self._depth:
            self._pending.pop(next(iter(self._pending))).cancel()
        self._pending[batch_id] = self._threads.submit(self._read, indices, keys)

    def get(self, indices: Tensor, keys: Tensor) -> T:
        """The batch, read now unless it has been prefetched. Raises the error of reading it."""
        future = self._pending.pop(_batch_id(indices, keys), None)
        return self._read(indices, keys) if future is None else future.result()


def _batch_id(indices: Tensor, keys: Tensor) -> bytes:
    return indices.numpy().tobytes() + keys.numpy().tobytes()
