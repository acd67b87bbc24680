"""A worker: takes trials from the ledger, one after the other, until none is left.

Any number may work on the same trials, in one process, on one machine or on several: who holds the lease of a trial's
folder runs it, and the others go on to the next.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from harness import ledger
from harness.lease import Lease
from harness.ledger import Entry
from harness.problems import UserError
from harness.process import Child, Place

LOOK_AGAIN_SECONDS = 2.0
"""While others are at the last trials: one of them may die and give its trial back."""


class Worker:
    """Runs in one thread; `stop` may be called from another."""

    def __init__(self, entries: Sequence[Entry], place: Place | None = None) -> None:
        self._pending = list(entries)
        self._place = place or Place()
        self._stopping = threading.Event()
        self._child: Child | None = None

    def work(self) -> None:
        """Until every trial is over, or `stop`. UserError for what the user must mend; the rest of the trials waits."""
        while self._pending and not self._stopping.is_set():
            taken = self._take()
            if taken is None:
                self._stopping.wait(LOOK_AGAIN_SECONDS)
                continue
            entry, lease = taken
            try:
                self._run(entry, lease)
            finally:
                lease.release()

    def stop(self) -> None:
        """Interrupt the trial that is running; `work` returns when it has stopped."""
        self._stopping.set()
        if self._child is not None:
            self._child.interrupt()

    def _take(self) -> tuple[Entry, Lease] | None:
        """The first trial that is free; those that are over are forgotten."""
        for entry in list(self._pending):
            state = ledger.state_of(entry)
            if state.is_over:
                self._pending.remove(entry)
            elif state.is_open and (lease := take(entry)) is not None:
                # It may have been run between the look and the lease.
                if ledger.state_of(entry).is_over:
                    lease.release()
                    self._pending.remove(entry)
                else:
                    return entry, lease
        return None

    def _run(self, entry: Entry, lease: Lease) -> None:
        self._child = child = Child(entry.run, lease, self._place)
        lease.keep(when_lost=child.kill)
        if self._stopping.is_set():
            child.interrupt()
        try:
            what = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            self._child = None
        if what is None or not lease.is_held():
            return
        try:
            ledger.crashed(entry, what)
        except FileNotFoundError:
            # Nothing of the trial exists: it is the environment that is broken, not the trial.
            raise UserError(f"{entry.name}: {what}") from None


def take(entry: Entry) -> Lease | None:
    """The lease of a trial's folder, which is made if need be; None if somebody else has it."""
    try:
        entry.folder.mkdir(parents=True, exist_ok=True)
        return Lease.take(entry.folder, executor=entry.base.executor.name)
    except OSError as error:
        raise UserError(
            f"records={entry.base.records}: {entry.folder} cannot be written ({error.strerror}); "
            "make room or give another folder with records=; the same command continues"
        ) from error


def work(entries: Sequence[Entry], place: Place | None = None) -> None:
    """A worker from start to end, which an exception of this thread (a scheduler's, say) stops."""
    worker = Worker(entries, place)
    with contextlib.ExitStack() as stack:
        stack.callback(worker.stop)
        worker.work()
