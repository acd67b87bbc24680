"""Where workers run: processes of this machine, a SLURM cluster, a Ray cluster.

Each executor starts `executor.workers` workers (harness/study/worker.py) on the same trials and waits for them.
Executors are stateless: workers pull trials from the ledger, so that workers may join or die at any time.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness.config.schema import Executor, Run
from harness.errors import UserError
from harness.processes import SOURCE_ROOT
from harness.study.ledger import PlannedTrial
from harness.study.trial_process import Slot
from harness.study.worker import Worker, work

Report = Callable[[str], None]
"""Tells the user a line."""


def execute(trials: Sequence[PlannedTrial], report: Report) -> None:
    """Run the trials with the executor of their configuration, until all are over.

    Raises UserError for errors that the user has to correct, and KeyboardInterrupt after all running trials have
    stopped.
    """
    executor = trials[0].study.executor
    # One executor for all: a command refuses a sweep over executors.
    {"local": _local, "slurm": _slurm, "ray": _ray}[executor.name](trials, executor, report)


# ---- this machine ------------------------------------------------------------------------------------------------


def _local(trials: Sequence[PlannedTrial], executor: Executor, report: Report) -> None:
    """A thread for each worker; every trial runs in a process of its own."""
    number = min(executor.workers, len(trials))
    workers = [Worker(trials, slot) for slot in assign_slots(trials[0].study, number, report)]
    with ThreadPoolExecutor(number) as pool:
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


def assign_slots(run: Run, number: int, report: Report) -> list[Slot]:
    """Cores or a GPU of its own for each of `number` workers, so that they do not disturb each other's timings.

    Where there are too few, workers share GPUs, or no worker is bound to cores; this is reported.
    """
    gpus = _visible_gpus(run)
    if gpus:
        if number > len(gpus):
            report(f"executor.workers={number} share {len(gpus)} GPUs: their seconds disturb each other")
        return [Slot(gpu=gpus[i % len(gpus)]) for i in range(number)]
    # macOS cannot bind a process to cores.
    if not hasattr(os, "sched_getaffinity"):
        return [Slot()] * number
    cores = sorted(os.sched_getaffinity(0))
    # Not enough cores: no worker is bound, and the system spreads them over all cores.
    if number * run.threads > len(cores):
        report(f"executor.workers={number} with threads={run.threads} share {len(cores)} cores: "
            "their seconds disturb each other")  # fmt: skip
        return [Slot()] * number
    return [Slot(cores=tuple(cores[i * run.threads : (i + 1) * run.threads])) for i in range(number)]


def _visible_gpus(run: Run) -> list[str]:
    if run.device not in ("auto", "cuda"):
        return []
    # Passed on as they are named, since the variable may hold UUIDs. torch is imported only where it is not set.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


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
    jobs: list[Any]
    try:
        submit = submitit.AutoExecutor(folder=run.records.resolve() / ".submitit", cluster=cluster)
        parameters = {"name": "pacemark", "cpus_per_task": run.threads, "timeout_min": executor.minutes or 240}
        if run.device.startswith("cuda"):
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
    for job in jobs:
        try:
            job.result()
        except submitit.core.utils.FailedJobError as error:
            # The end of the message: it holds the traceback of the job, whose last lines name the error.
            raise UserError(f"executor=slurm: job {job.job_id} failed: {str(error).strip()[-2000:]}") from error


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
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")])}}
    try:
        ray.init(**{"log_to_driver": False, "include_dashboard": False, "runtime_env": environment} | executor.options)
    except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"executor=ray: cannot start or join a cluster with executor.options={executor.options}: {error}"
        ) from error
    try:
        resources = {"num_cpus": run.threads, "num_gpus": 1 if run.device.startswith("cuda") else 0}
        # A task whose node is lost starts again: what it ran is in the ledger, so it goes on with what is left.
        task = ray.remote(max_retries=3, **resources)(work)
        number = min(executor.workers, len(trials))
        # More tasks than fit wait in Ray's queue; with room for none they would wait for ever.
        capacity = int(ray.cluster_resources().get("CPU", 0) // run.threads)
        if capacity < 1:
            raise UserError(f"executor=ray: the cluster has no {run.threads} cores for a trial")
        if number > capacity:
            report(f"executor.workers={number}, but the cluster has room for {capacity} at a time; the others wait")
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
