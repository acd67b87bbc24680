"""A worker: takes trials from the ledger, one after the other, until none is left.

Any number may work on the same trials, in one process, on one machine or on several: who holds the lease of a trial's
folder runs it, and the others go on to the next.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

from harness import log
from harness.errors import LeaseLost, UserError
from harness.records.kills import KILL_LIMIT, count_kills, note_kill
from harness.records.lease import Lease
from harness.records.packing import unpack_if_packed
from harness.study.ledger import PlannedTrial, read_state, record_crash
from harness.study.trial_process import Slot, TrialProcess

logger = logging.getLogger(__name__)

_STATUS_OF_AN_EXCEPTION = 1
"""With which Python ends."""
Report = Callable[[str], None]
"""Tells the user a line."""
POLL_SECONDS = 2.0
"""How long to wait while others run the last trials: one of them may die, and its trial become free again."""


class Worker:
    """Runs in one thread; `stop` may be called from another."""

    def __init__(self, trials: Sequence[PlannedTrial], slot: Slot | None = None) -> None:
        self._pending = list(trials)
        self._slot = slot or Slot()
        self._stopping = threading.Event()
        self._process: TrialProcess | None = None

    def work(self) -> None:
        """Run trials until every one is over, or `stop` is called. Raises UserError for errors that the user has
        to correct; the remaining trials stay as they are."""
        while self._pending and not self._stopping.is_set():
            claimed = self._claim_next()
            if claimed is None:
                if self._pending:
                    logger.debug("%d trials left, all of them held by others", len(self._pending))
                    # Not sleep(): stop() must end it at once.
                    self._stopping.wait(POLL_SECONDS)
                continue
            trial, lease = claimed
            try:
                self._run(trial, lease)
            finally:
                lease.release()

    def stop(self) -> None:
        """Interrupt the trial that is running; `work` returns when it has stopped."""
        # Set before the process is looked at: see _run.
        self._stopping.set()
        if self._process is not None:
            self._process.interrupt()

    def _claim_next(self) -> tuple[PlannedTrial, Lease] | None:
        """The first trial that is free, with its lease; trials that are over are dropped."""
        # A copy, since trials are removed within the loop.
        for trial in list(self._pending):
            state = read_state(trial)
            if state.is_over:
                self._pending.remove(trial)
            elif state.is_claimable and (lease := acquire_lease(trial)) is not None:
                # Another worker may have run it between the look and the lease.
                is_over, kills = read_state(trial).is_over, count_kills(trial.path)
                if not is_over and kills < KILL_LIMIT:
                    logger.info("%s: taken, with lease %s (it was %s)", trial.name, lease.holder.token, state.name)
                    return trial, lease
                why = "another worker finished it this moment" if is_over else f"left, after {kills} kills"
                logger.info("%s: %s", trial.name, why)
                lease.release()
                self._pending.remove(trial)
        return None

    def _run(self, trial: PlannedTrial, lease: Lease) -> None:
        """Run a trial in a process and wait for it; note a crash in its manifest. Raises UserError."""
        self._process = process = TrialProcess(trial.run, lease, self._slot, trial.name)
        # A child whose lease is lost must not write again.
        lease.start_heartbeat(when_lost=process.kill)
        # After _process is set: stop() sets the flag and then reads _process, so that one of the two sees the other.
        if self._stopping.is_set():
            process.interrupt()
        try:
            crash = process.wait()
        except UserError:
            # A child that finds its lease lost before this process does reports it as an error.
            if lease.is_owned():
                raise
            crash = None
        except BaseException:
            process.kill()
            raise
        finally:
            self._process = None
        # A lost lease is no crash: the process was killed for it, and another one has the folder.
        if not lease.is_owned():
            logger.warning("%s: lost to another worker; its process here was ended", trial.name)
            return
        if process.kill_cause is not None:
            # A scheduler that ends a job sends the signal to all of its processes.
            if self._stopping.is_set():
                return
            self._note_kill(trial, process.kill_cause)
            return
        if crash is None and process.exit_status == 0:
            crash = _check_record(trial, process.reached_end)
        if crash is None:
            return
        cause = crash.partition("\n")[0]
        logger.info("%s: %s", trial.name, cause)
        try:
            record_crash(trial, crash, process.stop_reason, lease.check)
        except LeaseLost:
            logger.warning("%s: lost to another worker before its crash was noted", trial.name)
        except FileNotFoundError:
            # Nothing of the trial exists. Python says so where it is the environment that is broken, a package that
            # cannot be loaded, say: every trial would meet it.
            if process.exit_status == _STATUS_OF_AN_EXCEPTION:
                raise UserError(f"{trial.name}: {crash}") from None
            self._note_kill(trial, cause)

    def _note_kill(self, trial: PlannedTrial, cause: str) -> None:
        """Note that the process of a trial was ended from outside: the trial goes on after the others, unless this
        happened too often. Raises UserError where it cannot be noted."""
        try:
            kills = note_kill(trial.path, cause)
        except OSError as error:
            raise _unwritable(trial, error) from error
        self._pending.remove(trial)
        if kills < KILL_LIMIT:
            # Where memory ran out, another trial may have ended until then.
            self._pending.append(trial)
            logger.info("%s: %s (kill %d of %d); it goes on", trial.name, cause, kills, KILL_LIMIT)
        else:
            logger.warning("%s: %s, %d times without a new checkpoint; it is left", trial.name, cause, kills)


def _check_record(trial: PlannedTrial, reached_end: bool) -> str | None:
    """How the process of a trial ended that ended with status 0, if the trial is not over; None if it is. reached_end:
    whether the process came to the end of its own program, where the submission did not end it. Raises UserError where
    it came there and left no record in the trial's folder: the worker would start it again and again."""
    manifest = read_state(trial).manifest
    if manifest is None and reached_end:
        raise UserError(
            f"{trial.path.folder} has no record although its process ended well: that process sees another machine "
            "than the one that the trial is planned for; name the folder of records with machine=NAME"
        )
    if manifest is not None and manifest.status.is_finished:
        return None
    return "the process of the trial ended with status 0 before the trial was over"


def acquire_lease(trial: PlannedTrial) -> Lease | None:
    """The lease of a trial's folder, which is made if need be; None if another process holds it. A submission that was
    packed since the trial was planned is unpacked. Raises UserError if the folder cannot be written."""
    folder = trial.path.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease.acquire(folder, executor=trial.study.executor.name)
    except OSError as error:
        raise _unwritable(trial, error) from error
    if lease is not None:
        # With the lease, since a folder in which a trial runs is not packed.
        try:
            unpack_if_packed(trial.path.submission_folder)
        except BaseException:
            lease.release()
            raise
    return lease


def _unwritable(trial: PlannedTrial, error: OSError) -> UserError:
    return UserError(
        f"records={trial.path.records}: {trial.path.folder} cannot be written ({error.strerror}); "
        "make room or give another folder with records=; the same command continues"
    )


def work(trials: Sequence[PlannedTrial], slot: Slot | None = None) -> None:
    """Run a worker from start to end; an exception of this thread (of a scheduler, say) stops it."""
    # A task of Ray: it has inherited the level, and its standard error is its log.
    log.configure()
    worker = Worker(trials, slot)
    with contextlib.ExitStack() as stack:
        stack.callback(worker.stop)
        worker.work()


def work_in_threads(workers: Sequence[Worker], report: Report) -> None:
    """Run each worker in a thread. An exception of this thread, Ctrl-C too, stops them first; an error of one of them
    stops the others and is raised."""
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.work) for worker in workers]
        try:
            # FIRST_EXCEPTION: an error that the user has to correct would meet every worker.
            futures.wait(running, return_when=futures.FIRST_EXCEPTION)
        except KeyboardInterrupt:
            report("stopping the running trials; the same command continues them")
            raise
        finally:
            # After an error or an interruption the running trials stop, with a status in their records, before it is
            # raised again. Where all have ended, there is nothing to stop.
            for worker in workers:
                worker.stop()
            # Futures are waited for, and not threads: Thread.join forgets a thread in which Ctrl-C interrupted it.
            futures.wait(running)
        # Raises the first error.
        for future in running:
            future.result()
