"""The processes that share one trial, as a submission and the step context see them: who they are, and collectives.

Every rank holds the same weights and runs some of each step's micro-batches. Sums over the ranks are explicit, without
a wrapper around the model, so that extra gradients and Hessian-vector products are reduced too. Rank 0 owns the record
and takes every decision. How the processes find each other, and what happens when one is lost:
harness/trial/distributed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process's view of all of them. With a size of 1 nothing is ever sent.

    All collectives (all_reduce_sum_ to run_on_all) must be called by every rank, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the ranks of this machine: which of its GPUs."""
    processes: tuple[tuple[str, int], ...] = ()
    """Host (`harness.processes.host_id`) and process id of each rank."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def process_group(self) -> Any:
        """torch's process group of all ranks (of this process alone without a launcher), for submissions that exchange
        tensors themselves."""
        if not dist.is_initialized():
            # HashStore: one process needs no address or port to meet others at.
            dist.init_process_group(communication_backend(), store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` micro-batches `rank` (default: this one) runs: contiguous, sizes differing by at most 1."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def shares(self, count: int) -> tuple[int, ...]:
        """How many of `count` micro-batches each rank runs."""
        return tuple(len(self.share(count, rank)) for rank in range(self.size))

    # ---- collectives on tensors ------------------------------------------------------------------------------------

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place; one message per dtype.

        Every rank must pass tensors of the same shapes and dtypes in the same order.
        """
        if self.size == 1 or not tensors:
            return
        # dict.fromkeys and not set(): every rank must send the dtypes in the same order.
        with torch.no_grad():
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
                # One message for many small tensors: each message costs a latency.
                flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
                dist.all_reduce(flat)
                pieces = flat.split([tensor.numel() for tensor in same_dtype])
                sums = [piece.view_as(tensor) for piece, tensor in zip(pieces, same_dtype, strict=True)]
                torch._foreach_copy_(same_dtype, sums)

    def all_gather_rows(self, tensors: Sequence[Tensor], shares: Sequence[int]) -> list[Tensor]:
        """The rows of all ranks in rank order, for each tensor; one message per dtype.

        tensors: each [shares[rank], ...]. shares: how many rows each rank has. Returns tensors [sum(shares), ...].
        """
        if self.size == 1:
            return list(tensors)
        gathered = list(tensors)
        # In the order of the tensors, the same on every rank.
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            positions = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            shapes = [tensors[i].shape[1:] for i in positions]
            columns = [tensors[i].flatten(1) if tensors[i].ndim > 1 else tensors[i][:, None] for i in positions]
            own_rows = torch.cat(columns, 1)
            # all_gather wants equal shapes, so ranks with fewer rows send some zeros.
            padded = own_rows.new_zeros(max(shares), own_rows.shape[1])
            padded[: len(own_rows)] = own_rows
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded)
            rows = torch.cat([piece[:share] for piece, share in zip(received, shares, strict=True)])
            for i, shape, values in zip(positions, shapes, rows.split([s.numel() for s in shapes], 1), strict=True):
                gathered[i] = values.reshape(len(rows), *shape)
        return gathered

    # ---- collectives on Python objects -----------------------------------------------------------------------------

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. Anything that pickles; waits for rank 0."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Anything that pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather(None)

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action()` on every rank. Where it raises a UserError on any of them, raise one with all messages on
        each, so that the ranks stay together."""
        # Ranks without an error gather too: a rank that left the collective out would block the others.
        messages: list[str] = []
        try:
            result = action()
        except UserError as error:
            # Alone, the original error keeps its cause and traceback.
            if self.size == 1:
                raise
            messages = error.messages
        all_messages = dict.fromkeys(message for of_rank in self.all_gather(messages) for message in of_rank)
        if all_messages:
            raise UserError(all_messages)
        return result


SINGLE_RANK = Ranks()
"""A trial that runs in one process."""


def communication_backend() -> str:
    """The backend for torch.distributed: NCCL for tensors on GPUs, gloo for everything on the CPU."""
    # gloo beside NCCL: decisions and objects are exchanged on the CPU, where they need not wait for the GPU.
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
