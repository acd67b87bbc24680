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
from collections.abc import Sequence
from typing import Any

from harness import log
from harness.config.schema import Executor, Run
from harness.errors import UserError
from harness.processes import SOURCE_ROOT
from harness.records.kills import forget_kills
from harness.study.ledger import PlannedTrial
from harness.study.machine import list_visible_gpus
from harness.study.reservations import Reservation, reservation
from harness.study.slurm import run_jobs
from harness.study.trial_process import Slot
from harness.study.worker import Report, Worker, work, work_in_threads

logger = logging.getLogger(__name__)

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
    {"local": _local, "slurm": run_jobs, "ray": _ray}[executor.name](trials, executor, report)


# ---- this machine ------------------------------------------------------------------------------------------------


def _local(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A thread for each worker; every trial runs in a process of its own."""
    number = min(executor.workers, len(trials))
    with reservation() as reserved:
        slots = assign_slots(trials[0].study, number, report, reserved)
        logger.debug("slots of the workers: %s", slots)
        work_in_threads([Worker(trials, slot) for slot in slots], report)


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
