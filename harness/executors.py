"""Where workers run: processes of this machine, a SLURM cluster, a Ray cluster.

Each executor starts `executor.workers` workers (harness/worker.py) on the same trials and waits for them. None knows
anything of trials: the ledger hands them out, so that any of them can be joined by another, or die.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import worker
from harness.config import Executor, Run
from harness.ledger import Entry
from harness.problems import UserError
from harness.process import ROOT, Place
from harness.worker import Worker

Say = Callable[[str], None]


def execute(entries: Sequence[Entry], say: Say) -> None:
    """Run the trials with the executor of their configuration, until all are over.

    UserError for what the user must mend; KeyboardInterrupt after every running trial has been stopped.
    """
    executor = entries[0].base.executor
    {"local": _local, "slurm": _slurm, "ray": _ray}[executor.name](entries, executor, say)


# ---- this machine ------------------------------------------------------------------------------------------------


def _local(entries: Sequence[Entry], executor: Executor, say: Say) -> None:
    number = min(executor.workers, len(entries))
    workers = [Worker(entries, place) for place in places(entries[0].base, number, say)]
    with ThreadPoolExecutor(number) as pool:
        running = [pool.submit(one.work) for one in workers]
        try:
            futures.wait(running, return_when=futures.FIRST_EXCEPTION)
        except KeyboardInterrupt:
            say("stopping the running trials; the same command continues them")
            raise
        finally:
            # Nothing to stop where all have come to their end; after an error or an interruption the trials are left
            # in good order before it is passed on.
            for one in workers:
                one.stop()
            futures.wait(running)
        for one_running in running:
            one_running.result()


def places(run: Run, number: int, say: Say) -> list[Place]:
    """Cores and a GPU for each of `number` workers, so that they do not disturb each other's timings; says when they
    must."""
    gpus = _gpus(run)
    if gpus:
        if number > len(gpus):
            say(f"executor.workers={number} share {len(gpus)} GPUs: their seconds disturb each other")
        return [Place(gpu=gpus[i % len(gpus)]) for i in range(number)]
    if not hasattr(os, "sched_getaffinity"):
        return [Place()] * number
    cores = sorted(os.sched_getaffinity(0))
    if number * run.threads > len(cores):
        say(f"executor.workers={number} with threads={run.threads} share {len(cores)} cores: "
            "their seconds disturb each other")  # fmt: skip
        return [Place()] * number
    return [Place(cores=tuple(cores[i * run.threads : (i + 1) * run.threads])) for i in range(number)]


def _gpus(run: Run) -> list[str]:
    if run.device not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# ---- SLURM -------------------------------------------------------------------------------------------------------


class _Job:
    """One job of the array. submitit calls `checkpoint` when the job is preempted or out of time: the job is then put
    in the queue again, and its trial goes on from its checkpoint."""

    def __call__(self, entries: Sequence[Entry]) -> None:
        worker.work(entries)

    def checkpoint(self, entries: Sequence[Entry]) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, entries)


def _slurm(entries: Sequence[Entry], executor: Executor, say: Say) -> None:
    try:
        submitit: Any = importlib.import_module("submitit")
    except ImportError as error:
        raise UserError("executor=slurm: submitit is not installed; pip install -e '.[slurm]'") from error
    run = entries[0].base
    cluster = executor.options.get("cluster")
    options = {key: value for key, value in executor.options.items() if key != "cluster"}
    jobs: list[Any]
    try:
        submit = submitit.AutoExecutor(folder=run.records.resolve() / ".submitit", cluster=cluster)
        parameters = {"name": "pacemark", "cpus_per_task": run.threads, "timeout_min": executor.minutes or 240}
        if run.device.startswith("cuda"):
            parameters["gpus_per_node"] = 1
        submit.update_parameters(**parameters | options)
        jobs = submit.map_array(_Job(), [entries] * min(executor.workers, len(entries)))
    except (RuntimeError, NameError, TypeError, OSError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(
            f"executor=slurm: {error}; run this where sbatch works, or take executor=local. "
            f"executor.options holds parameters of submitit: {options or 'none given'}"
        ) from error
    say(f"submitted {len(jobs)} jobs: {', '.join(job.job_id for job in jobs)} (interrupting this command leaves them)")
    for job in jobs:
        try:
            job.result()
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"executor=slurm: job {job.job_id} failed: {str(error).strip()[-2000:]}") from error


# ---- Ray ---------------------------------------------------------------------------------------------------------


def _ray(entries: Sequence[Entry], executor: Executor, say: Say) -> None:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("executor=ray: ray is not installed; pip install -e '.[ray]'") from error
    run = entries[0].base
    _check_reachable(str(executor.options.get("address", "")))
    # Workers import the same code as this process.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}}
    try:
        ray.init(**{"log_to_driver": False, "include_dashboard": False, "runtime_env": environment} | executor.options)
    except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"executor=ray: cannot start or join a cluster with executor.options={executor.options}: {error}"
        ) from error
    try:
        need = {"num_cpus": run.threads, "num_gpus": 1 if run.device.startswith("cuda") else 0}
        task = ray.remote(max_retries=3, **need)(worker.work)
        number = min(executor.workers, len(entries))
        fit = int(ray.cluster_resources().get("CPU", 0) // run.threads)
        if fit < 1:
            raise UserError(f"executor=ray: the cluster has no {run.threads} cores for a trial")
        if number > fit:
            say(f"executor.workers={number}, but the cluster has room for {fit} at a time; the others wait")
        references = [task.remote(list(entries)) for _ in range(number)]
        try:
            ray.get(references)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, UserError) else UserError(f"executor=ray: {error}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"executor=ray: {error}") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """UserError if nobody listens at host:port. Ray itself tries for many minutes before it gives up."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"executor=ray: nobody answers at executor.options.address={address} ({error}); start the cluster with "
            "`ray start --head`, or leave the address out for one of this machine's own"
        ) from error
