"""Where workers run: processes of this machine, a SLURM cluster, a Ray cluster.

Each executor starts `executor.workers` workers (harness/study/worker.py) on the same trials and waits for them.
Executors are stateless: workers pull trials from the ledger, so that workers may join or die at any time.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import log
from harness.config.schema import Executor, Run
from harness.errors import UserError
from harness.processes import SOURCE_ROOT
from harness.records.kills import forget_kills
from harness.study.ledger import PlannedTrial
from harness.study.machine import list_visible_gpus
from harness.study.reservations import Reservation, reservation
from harness.study.trial_process import Slot
from harness.study.worker import Worker, work

logger = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Tells the user a line."""
JOB_POLL_SECONDS = 1.0
"""Between two looks at the jobs of a cluster; submitit asks SLURM itself far less often."""
_DISTURBED = "their seconds disturb each other"


def execute(trials: Sequence[PlannedTrial], report: Report) -> None:
    """Run the trials with the executor of their configuration, until all are over or nothing is left that could run
    them: jobs of a cluster can be cancelled.

    Raises UserError for errors that the user has to correct, and KeyboardInterrupt after all running trials have
    stopped.
    """
    executor = trials[0].study.executor
    logger.info("executor=%s with %d workers for %d trials", executor.name, executor.workers, len(trials))
    # A new command tries again what was killed too often for the last one.
    for trial in trials:
        with contextlib.suppress(OSError):
            forget_kills(trial.path)
    # One executor for all: a command refuses a sweep over executors.
    {"local": _local, "slurm": _slurm, "ray": _ray}[executor.name](trials, executor, report)


# ---- this machine ------------------------------------------------------------------------------------------------


def _local(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A thread for each worker; every trial runs in a process of its own."""
    number = min(executor.workers, len(trials))
    with reservation() as reserved:
        slots = assign_slots(trials[0].study, number, report, reserved)
        logger.debug("slots of the workers: %s", slots)
        _work_in_threads([Worker(trials, slot) for slot in slots], report)


def _work_in_threads(workers: Sequence[Worker], report: Report) -> None:
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


def assign_slots(run: Run, number: int, report: Report, reserved: Reservation | None = None) -> list[Slot]:
    """Cores or a GPU of its own for each of `number` workers, so that they do not disturb each other's timings.

    reserved: locks them, so that other pools of this machine take others; None: nobody else is looked at. Where there
    are too few, workers share GPUs, or no worker is bound to cores; this is reported.
    """
    gpus = list_visible_gpus() if run.device in ("auto", "cuda") else []
    if gpus:
        if number > len(gpus):
            report(f"executor.workers={number} share {len(gpus)} GPU{'s' * (len(gpus) > 1)}: {_DISTURBED}")
        wanted = min(number, len(gpus))
        free = gpus[:wanted] if reserved is None else reserved.take("gpu", gpus, wanted)
        if len(free) < wanted:
            report(f"other trials run on {len(gpus) - len(free)} of {len(gpus)} GPUs of this machine: {_DISTURBED}")
            free += [gpu for gpu in gpus if gpu not in free][: wanted - len(free)]
        return [Slot(gpu=free[i % wanted]) for i in range(number)]
    # One GPU that the user names, for all workers.
    if run.device.startswith("cuda"):
        if number > 1:
            report(f"executor.workers={number} share device={run.device}: {_DISTURBED}; device=cuda gives each a GPU")
        return [Slot()] * number
    # macOS cannot bind a process to cores.
    if not hasattr(os, "sched_getaffinity"):
        return [Slot()] * number
    cores = sorted(os.sched_getaffinity(0))
    # Not enough cores: no worker is bound, and the system spreads them over all cores.
    if number * run.threads > len(cores):
        report(f"executor.workers={number} with threads={run.threads} share {len(cores)} cores: {_DISTURBED}")
        return [Slot()] * number
    wanted = number * run.threads
    if reserved is not None:
        unused = [int(core) for core in reserved.take("core", [str(core) for core in cores], wanted)]
        if len(unused) < wanted:
            reserved.release()
            busy = len(cores) - len(unused)
            report(f"other trials run on {busy} of {len(cores)} cores of this machine: {_DISTURBED}")
            return [Slot()] * number
        cores = unused
    return [Slot(cores=tuple(cores[i * run.threads : (i + 1) * run.threads])) for i in range(number)]


# ---- SLURM -------------------------------------------------------------------------------------------------------


class _Job:
    """One job of the array, which runs a worker. At module level, since submitit pickles it."""

    def __call__(self, trials: Sequence[PlannedTrial]) -> None:
        work(trials)

    def checkpoint(self, trials: Sequence[PlannedTrial]) -> Any:
        """Called by submitit when the job is preempted or out of time: requeue it. Its trial resumes from its
        checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, trials)


def _slurm(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A job array with one worker per job; waits until all jobs have ended."""
    try:
        submitit: Any = importlib.import_module("submitit")
    except ImportError as error:
        raise UserError("executor=slurm: submitit is not installed; pip install -e '.[slurm]'") from error
    run = trials[0].study
    cluster = executor.options.get("cluster")
    options = {key: value for key, value in executor.options.items() if key != "cluster"}
    folder = run.records.resolve() / ".submitit"
    jobs: list[Any]
    with _quiet_submitit():
        try:
            submit = submitit.AutoExecutor(folder=folder, cluster=cluster)
            parameters = {"name": "pacemark", "cpus_per_task": run.threads, "timeout_min": executor.minutes or 240}
            if _wants_slurm_gpu(run, cluster, options, report):
                parameters["gpus_per_node"] = 1
            # The user's options win over ours.
            submit.update_parameters(**parameters | options)
            jobs = submit.map_array(_Job(), [trials] * min(executor.workers, len(trials)))
        except (RuntimeError, NameError, TypeError, OSError, submitit.core.utils.FailedSubmissionError) as error:
            raise UserError(
                f"executor=slurm: {error}; run this where sbatch works, or take executor=local. "
                f"executor.options holds parameters of submitit: {options or 'none given'}"
            ) from error
        job_ids = ", ".join(job.job_id for job in jobs)
        report(f"submitted {len(jobs)} jobs: {job_ids} (interrupting this command leaves them)")
        logger.info("the jobs write their logs into %s", folder)
        _wait_for_jobs(jobs, submitit.core.utils, report)


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
        command = ["sinfo", "--noheader", "--format=%P|%G"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
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


def _wait_for_jobs(jobs: Sequence[Any], errors: Any, report: Report) -> None:
    """Wait until all jobs have ended. A job that was cancelled or lost is reported, and the others go on.

    errors: the module of submitit that has them. Raises UserError for an error that the user has to correct.
    """
    pending = list(jobs)
    while pending:
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
                rest = f"{len(pending)} still {'runs' if len(pending) == 1 else 'run'}"
                report(f"job {job.job_id} {cause}; {rest if pending else 'none is left'}; the same command continues")
        if not ended:
            time.sleep(JOB_POLL_SECONDS)


def _cause_of_loss(job: Any, error: Exception, errors: Any) -> str | None:
    """How a job ended that was taken away from outside, as part of a sentence; None if its own code failed."""
    if isinstance(error, errors.FailedJobError):
        # submitit raises this in a job that may not be requeued any more.
        return "was out of time too often" if "Job not requeued because: timed-out" in str(error) else None
    # Without accounting the state is UNKNOWN. An array lists it as `CANCELLED by 1000`.
    state = str(job.state).split(" ")[0].lower().replace("_", " ")
    words = {"cancelled": "was cancelled", "preempted": "was preempted", "timeout": "was out of time",
             "out of memory": "was out of memory", "node fail": "lost its node"}  # fmt: skip
    # What is left without a state: a killed process leaves no result.
    return words.get(state, "was cancelled or its node was lost")


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


# ---- Ray ---------------------------------------------------------------------------------------------------------


def _ray(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A Ray task for each worker; waits until all tasks have ended."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("executor=ray: ray is not installed; pip install -e '.[ray]'") from error
    run = trials[0].study
    _check_reachable(str(executor.options.get("address", "")))
    # Workers import the same code as this process.
    variables = {"PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")])}
    # Tasks on other machines do not inherit the level.
    if log.VARIABLE in os.environ:
        variables[log.VARIABLE] = os.environ[log.VARIABLE]
    # What a task writes comes to this terminal only where it was asked for: Ray adds lines of its own.
    ours = {"log_to_driver": log.is_shown(logging.INFO), "include_dashboard": False}
    try:
        ray.init(**ours | {"runtime_env": {"env_vars": variables}} | executor.options)
    except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"executor=ray: cannot start or join a cluster with executor.options={executor.options}: {error}"
        ) from error
    try:
        available = ray.cluster_resources()
        wants_gpu = run.device != "cpu" and (run.device != "auto" or available.get("GPU", 0) >= 1)
        resources = {"num_cpus": run.threads, "num_gpus": int(wants_gpu)}
        # A task whose node is lost starts again: what it ran is in the ledger, so it goes on with what is left.
        task = ray.remote(max_retries=3, **resources)(work)
        number = min(executor.workers, len(trials))
        # More tasks than fit wait in Ray's queue; with room for none they would wait for ever.
        capacity = int(available.get("CPU", 0) // run.threads)
        if capacity < 1:
            raise UserError(f"executor=ray: the cluster has no {run.threads} cores for a trial")
        if wants_gpu:
            capacity = min(capacity, int(available.get("GPU", 0)))
            if capacity < 1:
                raise UserError(f"device={run.device}: the Ray cluster has no GPU; use device=cpu")
        if number > capacity:
            report(f"executor.workers={number}, but the cluster has room for {capacity} at a time; the others wait")
        logger.info("the cluster has room for %d trials at a time", capacity)
        references = [task.remote(list(trials)) for _ in range(number)]
        try:
            ray.get(references)
        except ray.exceptions.RayTaskError as error:
            # Ray wraps the exception of a task; a UserError keeps its messages.
            cause = error.cause
            raise cause if isinstance(cause, UserError) else UserError(f"executor=ray: {error}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"executor=ray: {error}") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at host:port. Ray itself tries for many minutes before it gives up."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"executor=ray: nothing answers at executor.options.address={address} ({error}); start the cluster with "
            "`ray start --head`, or leave the address out for one of this machine's own"
        ) from error
