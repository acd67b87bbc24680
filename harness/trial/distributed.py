"""The life of the processes that torchrun starts for one trial: meeting, ending together, and losing one.

    init_distributed()  ->  ... the trial, within watchdog(ranks, give_up) ...  ->  shutdown(code)

A rank that fails calls `announce_exit`, which tells the others how it ended. A rank that waits for its GPU, while the
GPU waits for a sum that a lost rank never joins, hears neither signals nor exceptions. `watchdog` is for that one: a
thread looks whether any rank has announced its exit or died, and ends this process if the trial does not leave by
itself within seconds. torchrun alone would kill it after 30 seconds, and the record would not say why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist

from harness.errors import UserError
from harness.interface.ranks import SINGLE_RANK, Ranks, communication_backend
from harness.processes import host_id, is_launched, local_rank, process_start_time, world_size

# Keys of the launcher's store: the first exists once any rank has ended early, the second says how.
_ANY_EXIT_KEY = "pacemark/exited"
_EXIT_KEY = "pacemark/exit/{rank}"

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 3.0
"""How long a failing rank waits to learn how the others end, and how long a rank that has lost another may take to
leave by itself. Together far below the 30 seconds after which torchrun kills."""


class RankExit(NamedTuple):
    """The announcement of a rank that ends early."""

    status: str
    """A `harness.records.status.Status`."""
    traceback: str
    """Empty where there is none."""


def init_distributed() -> Ranks:
    """Connect to the other ranks that the launcher started, once per process; waits for all of them. Without a
    launcher: SINGLE_RANK. Raises UserError where they cannot meet."""
    if not is_launched():
        return SINGLE_RANK
    if not dist.is_initialized():
        try:
            dist.init_process_group(communication_backend())
        # DistError is a RuntimeError; ValueError: a variable of the launcher is missing.
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"the {world_size()} processes of the launcher cannot meet ({reason}); start them all with torchrun, "
                "which sets RANK, MASTER_ADDR and MASTER_PORT"
            ) from error
    rank, size = dist.get_rank(), dist.get_world_size()
    # Gathered before anything can fail: a lost rank can no longer say which process it was.
    processes = Ranks(rank, size, local_rank()).all_gather((host_id(), os.getpid()))
    return Ranks(rank, size, local_rank(), tuple(processes))


def shutdown(code: int, *, wait: bool = True) -> int:
    """End this process with status `code` if it is one of several; else return `code`.

    wait=True: once every rank has come this far. wait=False: at once, where the ranks have lost each other.
    """
    if wait and is_initialized():
        if is_launched():
            dist.barrier()
        dist.destroy_process_group()
    if is_launched():
        # os._exit flushes nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        # A normal exit destroys objects that threads of the communication may still use, and sometimes aborts.
        os._exit(code)
    return code


def is_initialized() -> bool:
    """Whether this process is connected to others."""
    return dist.is_available() and dist.is_initialized()


def announce_exit(ranks: Ranks, status: str, error: str) -> dict[int, RankExit | None]:
    """Tell the other ranks that this one ends early, and wait a few seconds for their announcements.

    Returns the announcement of each rank that has ended; None for a process of this machine that died without one.
    The launcher's signals are ignored from here on: this process is ending already.
    """
    with suppress(ValueError):  # not the main thread, which alone receives signals
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    exits: dict[int, RankExit | None] = {}
    waiting = {rank for rank in range(ranks.size) if rank != ranks.rank}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with suppress(RuntimeError):  # the launcher's store is gone
        store = _launcher_store()
        # This key first: a rank that sees _ANY_EXIT_KEY looks for it.
        store.set(_EXIT_KEY.format(rank=ranks.rank), json.dumps([status, error]))
        store.set(_ANY_EXIT_KEY, "")
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                # Looked up first: a process may announce its exit and die between the two looks.
                died = _has_died(ranks, rank)
                # check() first, since get() blocks while the key is absent.
                if store.check([_EXIT_KEY.format(rank=rank)]):
                    exits[rank] = RankExit(*json.loads(store.get(_EXIT_KEY.format(rank=rank))))
                elif died:
                    exits[rank] = None
            waiting -= exits.keys()
            time.sleep(0.05)
    return exits


@contextmanager
def watchdog(ranks: Ranks, give_up: Callable[[], int]) -> Iterator[None]:
    """Within it, no rank waits for a lost one until the launcher kills it.

    Once a rank is lost and this one does not leave the body within seconds, `give_up` is called in the watching thread
    and the process ends with the status that it returns. It must not touch the device.

        watching --(a rank is lost)--> waiting for the body --(body left)--> nothing
                                                            --(too late)---> give_up, process ends
    """
    if ranks.size == 1:
        yield
        return
    body_left = threading.Event()
    # The first to take this lock decides: the thread that ends the process, or the body that was in time.
    ending = threading.Lock()
    # A store serves one caller at a time, and the communication may be waiting for an answer of the original.
    store = _launcher_store().clone()

    def watch() -> None:
        while not _any_rank_lost(ranks, store):
            # The pause between two looks, which ends at once when the body is left.
            if body_left.wait(_POLL_SECONDS):
                return
        if body_left.wait(_PATIENCE_SECONDS) or not ending.acquire(blocking=False):
            return
        code = 1
        try:
            code = give_up()
        except Exception:
            # Printed, since nothing above this thread would report it, and the process ends all the same.
            traceback.print_exc()
        finally:
            shutdown(code, wait=False)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        body_left.set()
        # Blocks until the process ends if the thread has begun to end it.
        ending.acquire()


def _any_rank_lost(ranks: Ranks, store: Any) -> bool:
    try:
        announced = store.check([_ANY_EXIT_KEY])
    except RuntimeError:  # the launcher's store is gone
        announced = True
    return announced or any(_has_died(ranks, rank) for rank in range(ranks.size))


def _has_died(ranks: Ranks, rank: int) -> bool:
    """Whether the process of `rank` is known to be gone; of another machine's this is never known."""
    host, process = ranks.processes[rank]
    return host == host_id() and process_start_time(process) is None


def _launcher_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
