"""The processes that share one trial, started by `torchrun --nproc_per_node=N run.py ...`.

Every rank holds the same weights and runs some of each step's micro-batches; what comes of them is added up here,
explicitly, without a wrapper around the model, so that extra gradients and Hessian-vector products are added up too.
Rank 0 owns the record and takes every decision.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from harness.lease import host_id, start_of
from harness.problems import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_PARTED = "pacemark/parted"
"""Key of the launcher's store: there once any rank has ended before its time."""
_PARTING = "pacemark/parting/{rank}"
_LOOK_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 3.0
"""How long a rank that ends before its time waits to learn what became of the others, and how long one that has lost
another may take to find its own way out. Together far below the 30 seconds after which torchrun kills."""


@dataclass(frozen=True)
class Ranks:
    """One process's view of them. With a size of 1 nothing is ever sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the ranks of this machine: which of its GPUs."""
    processes: tuple[tuple[str, int], ...] = ()
    """Host (as harness.lease.host_id has it) and process id of each rank."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> Any:
        """torch's process group of all ranks, or of this process alone, for whoever exchanges tensors itself."""
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` micro-batches this rank (or `rank`) runs: a contiguous part, sizes differing by at most
        one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def shares(self, count: int) -> tuple[int, ...]:
        """How many of `count` micro-batches each rank runs."""
        return tuple(len(self.share(count, rank)) for rank in range(self.size))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place; one message per dtype."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        with torch.no_grad():
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                mine = [tensor for tensor in tensors if tensor.dtype == dtype]
                flat = torch.cat([tensor.reshape(-1) for tensor in mine])
                dist.all_reduce(flat)
                pieces = flat.split([tensor.numel() for tensor in mine])
                torch._foreach_copy_(mine, [piece.view_as(t) for piece, t in zip(pieces, mine, strict=True)])

    def in_order(self, tensors: Sequence[Tensor], shares: Sequence[int]) -> list[Tensor]:
        """The rows of all ranks, one rank after the other, of each tensor; `shares` says how many each rank has. One
        message per dtype. [shares[rank], ...] -> [sum(shares), ...]."""
        if self.size == 1:
            return list(tensors)
        import torch
        import torch.distributed as dist

        whole = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            shapes = [tensors[i].shape[1:] for i in places]
            mine = torch.cat([tensors[i].flatten(1) if tensors[i].ndim > 1 else tensors[i][:, None] for i in places], 1)
            padded = mine.new_zeros(max(shares), mine.shape[1])
            padded[: len(mine)] = mine
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded)
            rows = torch.cat([piece[:share] for piece, share in zip(received, shares, strict=True)])
            for i, shape, values in zip(places, shapes, rows.split([s.numel() for s in shapes], 1), strict=True):
                whole[i] = values.reshape(len(rows), *shape)
        return whole

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank. Anything that pickles; waits for rank 0."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def of_all(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.of_all(None)

    def together(self, action: Callable[[], T]) -> T:
        """`action()` on every rank; UserError on all of them, with what each found, where it raises one on any."""
        problems: list[str] = []
        try:
            result = action()
        except UserError as error:
            if self.size == 1:
                raise
            problems = error.problems
        found = dict.fromkeys(problem for one in self.of_all(problems) for problem in one)
        if found:
            raise UserError(found)
        return result

    def part(self, status: str, text: str) -> dict[int, tuple[str, str] | None]:
        """Tell the others that this rank ends before its time, and how; learn the same of them, for a few seconds.

        Returns (status, text) by rank, None for a process of this machine that went without a word; ranks that are
        still at work are absent. The launcher's signals are ignored from here on: this process is ending already.
        """
        with suppress(ValueError):  # not in the main thread, which hears no signal then
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        found: dict[int, tuple[str, str] | None] = {}
        waiting = {rank for rank in range(self.size) if rank != self.rank}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with suppress(RuntimeError):  # the launcher's store is gone
            store = _store()
            store.set(_PARTING.format(rank=self.rank), json.dumps([status, text]))
            store.set(_PARTED, "")
            while waiting and time.monotonic() < deadline:
                for rank in sorted(waiting):
                    dead = self._dead(rank)
                    if store.check([_PARTING.format(rank=rank)]):
                        said = json.loads(store.get(_PARTING.format(rank=rank)))
                        found[rank] = (said[0], said[1])
                    elif dead:
                        found[rank] = None
                    waiting -= found.keys()
                time.sleep(0.05)
        return found

    @contextmanager
    def watched(self, give_up: Callable[[], int]) -> Iterator[None]:
        """Within it, no rank waits for one that is gone until the launcher kills it.

        A rank that waits for its GPU, and the GPU for a sum that a lost rank never joins, hears neither signals nor
        exceptions. So a thread looks whether any rank has parted or died; if this one does not leave the body by itself
        within seconds, `give_up` is called in that thread, and the process ends with the status that it returns. It
        must not touch the device.
        """
        if self.size == 1:
            yield
            return
        left, ending = threading.Event(), threading.Lock()

        # A store takes one caller at a time, and the communication may be waiting for an answer.
        store = _store().clone()

        def watch() -> None:
            while not self._one_is_gone(store):
                if left.wait(_LOOK_EVERY_SECONDS):
                    return
            if left.wait(_PATIENCE_SECONDS) or not ending.acquire(blocking=False):
                return
            code = 1
            try:
                code = give_up()
            except Exception:
                traceback.print_exc()
            finally:
                end(code, wait=False)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            left.set()
            ending.acquire()  # for good, if the thread has begun to end this process

    def _one_is_gone(self, store: Any) -> bool:
        try:
            parted = store.check([_PARTED])
        except RuntimeError:  # the launcher's store is gone
            parted = True
        return parted or any(self._dead(rank) for rank in range(self.size))

    def _dead(self, rank: int) -> bool:
        """Whether the process of `rank` is known to be gone; of another machine's it is not."""
        host, process = self.processes[rank]
        return host == host_id() and start_of(process) is None


ALONE = Ranks()


def launched() -> bool:
    """Whether a launcher such as torchrun started this process beside others."""
    return world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def met() -> bool:
    """Whether `join` has connected this process to others."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join() -> Ranks:
    """Meet the other ranks that the launcher started; ALONE where there are none. Waits for all of them."""
    if not launched():
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(_backend())
    rank, size = dist.get_rank(), dist.get_world_size()
    known = Ranks(rank, size, local_rank()).of_all((host_id(), os.getpid()))
    return Ranks(rank, size, local_rank(), tuple(known))


def end(code: int, *, wait: bool = True) -> int:
    """End this process if others were started beside it, once all have come so far; else return `code`.

    wait=False: at once, where the ranks have lost each other. The interpreter's own way out takes down what threads of
    the communication may still hold, and now and then aborts.
    """
    if wait and met():
        import torch.distributed as dist

        if launched():
            dist.barrier()
        dist.destroy_process_group()
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _backend() -> str:
    import torch

    # Decisions and objects always travel between the hosts, whatever the tensors' device.
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
