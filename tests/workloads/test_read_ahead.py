from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from workloads.data.read_ahead import ReadAhead

KEYS = torch.tensor([7])
CPU = torch.device("cpu")


class Reader:
    """Records the index of each read, and whether it was in the main thread."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, bool]] = []
        self.read_one = threading.Semaphore(0)

    def __call__(self, indices: Tensor, keys: Tensor) -> Tensor:
        if indices.item() < 0:
            raise OSError("a picture does not decode")
        self.reads.append((int(indices.item()), threading.current_thread() is threading.main_thread()))
        self.read_one.release()
        return indices * 10

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.read_one.acquire(timeout=30)


def test_a_prefetched_batch_is_read_once_and_ahead() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 2, CPU)
    ahead.prefetch(torch.tensor([1]), KEYS)
    ahead.prefetch(torch.tensor([1]), KEYS)
    reader.wait(1)
    assert reader.reads == [(1, False)]
    assert ahead.get(torch.tensor([1]), KEYS) == 10 and len(reader.reads) == 1
    assert ahead.get(torch.tensor([1]), KEYS) == 10 and reader.reads[-1] == (1, True)


def test_a_batch_that_was_not_prefetched_is_read_by_get() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 2, CPU)
    ahead.prefetch(torch.tensor([1]), KEYS)
    reader.wait(1)
    # Other keys are another augmentation.
    assert ahead.get(torch.tensor([1]), KEYS + 1) == 10
    assert reader.reads == [(1, False), (1, True)]


def test_unused_batches_are_dropped_for_new_ones() -> None:
    reader = Reader()
    ahead = ReadAhead(reader, 2, CPU)
    for i in range(1, 6):
        ahead.prefetch(torch.tensor([i]), KEYS)
        reader.wait(1)
    for i in (5, 4, 1):
        assert ahead.get(torch.tensor([i]), KEYS) == 10 * i
    assert [i for i, in_main in reader.reads if in_main] == [1]


def test_get_raises_the_error_of_reading() -> None:
    ahead = ReadAhead(Reader(), 2, CPU)
    ahead.prefetch(torch.tensor([-1]), KEYS)
    with pytest.raises(OSError, match="does not decode"):
        ahead.get(torch.tensor([-1]), KEYS)
