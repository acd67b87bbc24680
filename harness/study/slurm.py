"""executor=slurm: an array of jobs by submitit, with a worker in each, and the command that waits for them.

A job can be cancelled, preempted, put back into the queue or killed at any moment. Its worker then stops its trial and
leaves no result, or is simply gone; the trial goes on with the next worker. The command says so in a line, replaces the
job where nobody has asked for its end, and waits for the others.

How jobs stand is asked of squeue: sacct, which submitit asks, needs accounting, and without it a job that was cancelled
would be waited for for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import log
from harness.config.schema import Executor, Run
from harness.errors import UserError
from harness.study.ledger import PlannedTrial, read_state
from harness.study.machine import list_visible_gpus
from harness.study.worker import Report, Worker, work_in_threads

logger = logging.getLogger(__name__)

JOB_POLL_SECONDS = 1.0
"""Between two looks at the files of the jobs."""
QUEUE_POLL_SECONDS = 15.0
"""Between two calls of squeue, each for all jobs of the command."""
REPLACEMENTS = 3
"""For each worker: so many jobs that were taken away are submitted anew."""

_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT"}  # fmt: skip
"""States of a job that has ended. One that is put back into the queue can pass through them."""
_REPLACED = {"BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
"""Those that nobody has asked for, and that a longer time limit would not help."""
_WORDS = {"CANCELLED": "was cancelled", "PREEMPTED": "was preempted", "TIMEOUT": "was out of time",
          "OUT_OF_MEMORY": "was out of memory", "NODE_FAIL": "lost its node",
          "BOOT_FAIL": "lost its node", "DEADLINE": "was out of time"}  # fmt: skip


class _Job:
    """One job of the array, which runs a worker. At module level, since submitit pickles it."""

    def __call__(self, trials: Sequence[PlannedTrial]) -> None:
        # It has inherited the level, and its standard error is its log.
        log.configure()
        # SLURM sends it before it kills a job. submitit's own handler does nothing then, and the worker would go on.
        former = signal.signal(signal.SIGTERM, _leave)
        try:
            work_in_threads([Worker(trials)], logger.info)
        finally:
            signal.signal(signal.SIGTERM, former)

    def checkpoint(self, trials: Sequence[PlannedTrial]) -> Any:
        """Called by submitit when the job is preempted or out of time: requeue it. Its trial resumes from its
        checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, trials)


def _leave(number: int, _: object) -> None:
    """End this process once its trials have stopped. Without a result, which would say that the worker was done: the
    job may come back from the queue."""
    raise SystemExit(128 + number)


def run_jobs(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A job array with one worker per job; waits until all jobs have ended. Raises UserError where they cannot be
    submitted, and for an error of a worker that the user has to correct."""
    try:
        submitit: Any = importlib.import_module("submitit")
    except ImportError as error:
        raise UserError("executor=slurm: submitit is not installed; pip install -e '.[slurm]'") from error
    run = trials[0].study
    cluster = executor.options.get("cluster")
    options = {key: value for key, value in executor.options.items() if key != "cluster"}
    folder = run.records.resolve() / ".submitit"
    errors = submitit.core.utils
    number = min(executor.workers, len(trials))
    with _quiet_submitit():
        queue = _Queue()

        def submit(number: int) -> list[Any]:
            jobs = submitter.map_array(_Job(), [trials] * number)
            if submitter.cluster != "slurm":
                return list(jobs)
            return [_QueuedJob(job, queue, errors.UncompletedJobError) for job in jobs]

        try:
            submitter = submitit.AutoExecutor(folder=folder, cluster=cluster)
            parameters = {"name": "pacemark", "cpus_per_task": run.threads, "timeout_min": executor.minutes or 240}
            if _wants_slurm_gpu(run, cluster, options, report):
                parameters["gpus_per_node"] = 1
            # The user's options win over ours.
            submitter.update_parameters(**parameters | options)
            jobs = submit(number)
        except (RuntimeError, NameError, TypeError, OSError, errors.FailedSubmissionError) as error:
            raise UserError(
                f"executor=slurm: {error}; run this where sbatch works, or take executor=local. "
                f"executor.options holds parameters of submitit: {options or 'none given'}"
            ) from error
        job_ids = ", ".join(job.job_id for job in jobs)
        report(f"submitted {len(jobs)} jobs: {job_ids} (interrupting this command leaves them)")
        logger.info("the jobs write their logs into %s", folder)

        def replace() -> Any | None:
            """Another job, where there is something left for it to do and SLURM takes it."""
            if all(read_state(trial).is_over for trial in trials):
                return None
            try:
                return submit(1)[0]
            except (RuntimeError, OSError, errors.FailedSubmissionError) as error:
                logger.warning("no job could be submitted in its place: %s", error)
                return None

        wait_for_jobs(jobs, errors, report, replace)


def _wants_slurm_gpu(run: Run, cluster: str | None, options: Mapping[str, Any], report: Report) -> bool:
    """Whether a job asks for a GPU: under device=auto, if all nodes that it can get have one. Raises UserError where
    only some of them do."""
    # The user has said it.
    if run.device != "auto" or any("gpu" in key or "gres" in key for key in options):
        return run.device.startswith("cuda")
    if cluster in ("local", "debug"):
        # Their jobs run on this machine.
        return bool(list_visible_gpus())
    partitions = str(options.get("slurm_partition") or options.get("partition") or "")
    try:
        listed = _ask("sinfo", "--noheader", "--format=%P|%G")
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("sinfo: %s", error)
        report("device=auto: sinfo does not tell whether the nodes have GPUs, so the jobs ask for none; "
               "give device=cuda or device=cpu")  # fmt: skip
        return False
    have_gpus = parse_node_gpus(listed, partitions)
    if len(have_gpus) > 1:
        raise UserError(
            f"device=auto: of the nodes of {partitions or 'the default partition'} only some have GPUs; give "
            "device=cuda or device=cpu, or one partition with executor.options={slurm_partition: NAME}"
        )
    return have_gpus == {True}


def parse_node_gpus(listed: str, partitions: str = "") -> set[bool]:
    """Whether the nodes of the partitions have GPUs: both values where only some have, none where no node is listed.

    listed: what `sinfo --format=%P|%G` prints, a line for each kind of node with the partition and the generic
    resources. partitions: names, separated by commas; empty: the default partition, which sinfo marks with a star.
    """
    names = {name.strip() for name in partitions.split(",") if name.strip()}
    have_gpus = set()
    for line in listed.splitlines():
        partition, _, resources = line.strip().partition("|")
        if partition.rstrip("*") in names if names else partition.endswith("*"):
            have_gpus.add(any(entry.startswith("gpu:") for entry in resources.split(",")) or resources == "gpu")
    return have_gpus


# ---- how the jobs stand --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What squeue said of a job."""

    state: str
    restarts: int = 0


GONE = _Look("")
"""Of a job that squeue does not list any more: it forgets one some minutes after its end."""


@dataclass
class _Queue:
    """What squeue says of this user's jobs, asked once in a while for all of them."""

    looks: dict[str, _Look] = field(default_factory=dict)
    number: int = 0
    """Of the look; it grows with each answer of squeue."""
    _next: float = 0.0

    def look(self) -> None:
        """Ask squeue, if the last time is long enough ago. Where it does not answer nothing changes."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + QUEUE_POLL_SECONDS
        columns = "--Format=JobArrayID:50,State:30,RestartCnt:20"
        try:
            listed = _ask("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", columns)
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("squeue: %s", error)
            return
        self.looks = parse_queue(listed)
        self.number += 1


def parse_queue(listed: str) -> dict[str, _Look]:
    """By job what squeue lists of it: its id, as `12` or `12_3`, its state, how often it was put back."""
    looks = {}
    for line in listed.splitlines():
        job_id, state, restarts, *_ = [*line.split(), "", ""]
        looks[job_id] = _Look(state, int(restarts) if restarts.isdecimal() else 0)
    return looks


class _QueuedJob:
    """A job of submitit on SLURM. It is over when its result is there, or squeue has told twice that it has ended: a
    result can come later than the end, and a job that is put back passes through states of an end."""

    def __init__(self, job: Any, queue: _Queue, uncompleted: type[Exception]) -> None:
        """uncompleted: what to raise where there is no result."""
        self.job_id: str = job.job_id
        self._job, self._queue, self._uncompleted = job, queue, uncompleted
        self._last = _Look("PENDING")
        self._number = queue.number
        self._is_listed = False
        self._ended_at = 0

    @property
    def log(self) -> Path:
        """What it wrote to standard error."""
        return Path(self._job.paths.stderr)

    @property
    def state(self) -> str:
        """As squeue has it; empty where it is not listed any more."""
        return self._last.state

    def done(self) -> bool:
        """Whether the job has ended."""
        # Not submitit's own look, which asks sacct: without accounting that writes an error into the display.
        if self._has_result():
            return True
        self._queue.look()
        if self._queue.number == self._number:
            return False
        self._number = self._queue.number
        look = self._queue.looks.get(self.job_id, GONE)
        self._is_listed |= look is not GONE
        # The last state of a job that is forgotten tells more than none.
        if look is not GONE:
            self._last = _Look(look.state, self._last.restarts)
        # A job that was submitted this moment may be missing.
        is_over = look.state in _OVER if look is not GONE else self._is_listed
        self._ended_at = (self._ended_at or self._number) if is_over else 0
        return is_over and self._number > self._ended_at

    def count_new_restarts(self) -> int:
        """How often the job was put back into the queue since the last call."""
        restarts = self._queue.looks.get(self.job_id, self._last).restarts
        new, self._last = restarts - self._last.restarts, _Look(self._last.state, restarts)
        return new

    def result(self) -> Any:
        """Its result. Raises what its worker raised, as submitit has it, and where it left no result."""
        if not self._has_result():
            raise self._uncompleted(f"job {self.job_id} has ended as {self.state or 'unknown'} without a result")
        return self._job.result()

    def _has_result(self) -> bool:
        return bool(self._job.paths.result_pickle.exists())


def _ask(*command: str) -> str:
    """What a command of SLURM prints. Raises OSError and subprocess.SubprocessError."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


# ---- waiting for them ----------------------------------------------------------------------------------------------


def wait_for_jobs(
    jobs: Sequence[Any], errors: Any, report: Report, replace: Callable[[], Any | None] = lambda: None
) -> None:
    """Wait until all jobs have ended. A job that was cancelled or lost is reported, and the others go on.

    errors: the module of submitit that has them. replace: submits a job in the place of one that was lost, or returns
    None. Raises UserError for an error that the user has to correct.
    """
    pending = list(jobs)
    replacements = REPLACEMENTS * len(pending)
    while pending:
        for job in pending:
            if isinstance(job, _QueuedJob) and job.count_new_restarts():
                report(f"job {job.job_id} was put back into the queue; its trial goes on with the next worker")
        ended = [job for job in pending if job.done()]
        for job in ended:
            pending.remove(job)
            try:
                job.result()
                logger.info("job %s has ended", job.job_id)
            except errors.UncompletedJobError as error:
                cause = _cause_of_loss(job, error, errors)
                if cause is None:
                    # The end of the message: it holds the traceback of the job, whose last lines name the error.
                    text = str(error).strip()[-2000:]
                    raise UserError(f"executor=slurm: job {job.job_id} failed: {text}") from error
                logger.debug("job %s: %s", job.job_id, error)
                substitute = replace() if _state(job) in _REPLACED and replacements > 0 else None
                if substitute is not None:
                    replacements -= 1
                    pending.append(substitute)
                    report(f"job {job.job_id} {cause}; job {substitute.job_id} takes its place")
                    continue
                rest = f"{len(pending)} still {'runs' if len(pending) == 1 else 'run'}"
                report(f"job {job.job_id} {cause}; {rest if pending else 'none is left'}; the same command continues")
        if not ended:
            time.sleep(JOB_POLL_SECONDS)


def _cause_of_loss(job: Any, error: Exception, errors: Any) -> str | None:
    """How a job ended that was taken away from outside, as part of a sentence; None if its own code failed."""
    if isinstance(error, errors.FailedJobError):
        # submitit raises this in a job that may not be requeued any more.
        return "was out of time too often" if "Job not requeued because: timed-out" in str(error) else None
    if isinstance(job, _QueuedJob) and _state(job) == "FAILED":
        return f"ended without a result (its log: {job.log})"
    # What is left without a state: a killed process leaves no result.
    return _WORDS.get(_state(job), "was cancelled or its node was lost")


def _state(job: Any) -> str:
    """The state of a job. An array lists it as `CANCELLED by 1000`."""
    return str(job.state).split(" ")[0].upper()


@contextlib.contextmanager
def _quiet_submitit() -> Iterator[None]:
    """Within it, submitit's records come through this module's log: its own handlers would write into a live display,
    and without accounting it warns every few seconds that sacct cannot be asked."""
    theirs = logging.getLogger("submitit")
    is_told = False

    def take(record: logging.LogRecord) -> bool:
        nonlocal is_told
        if "sacct" not in record.getMessage():
            logger.log(record.levelno, "submitit: %s", record.getMessage())
            return False
        level = logging.DEBUG if is_told else logging.INFO
        is_told = True
        logger.log(level, "sacct does not answer, so the end of a job is known from its files: %s", record.getMessage())
        return False

    theirs.addFilter(take)
    try:
        yield
    finally:
        theirs.removeFilter(take)
