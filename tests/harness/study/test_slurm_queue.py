"""What the command of executor=slurm makes of what squeue lists; tests/slurm has a real SLURM."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.study import slurm

errors = pytest.importorskip("submitit.core.utils")


def install_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, *lists: str | None) -> None:
    """A command `squeue` that prints one list after the other, the last one for ever. None: it fails."""
    for number, listed in enumerate(lists):
        if listed is not None:
            (folder / str(number)).write_text(listed + "\n")
    (folder / "squeue").write_text(
        f"#!/bin/sh\ncd {folder}\nnumber=$(cat number 2>/dev/null || echo 0)\n"
        f"[ $number -lt {len(lists) - 1} ] && echo $((number + 1)) > number\nexec cat $number\n"
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setattr(slurm, "QUEUE_POLL_SECONDS", 0)
    monkeypatch.setattr(slurm, "JOB_POLL_SECONDS", 0)


class Submitter:
    """Submits jobs that never leave a result, but for those in `finished`."""

    def __init__(self, folder: Path, *finished: str) -> None:
        self.folder, self.queue, self.submitted = folder, slurm._Queue(), 0
        for job_id in finished:
            (folder / f"{job_id}.pkl").touch()

    def submit(self, job_id: str | None = None) -> slurm._QueuedJob:
        """A job with this id; without one it is a further job, r1, r2 and so on."""
        if job_id is None:
            self.submitted += 1
            job_id = f"r{self.submitted}"
        paths = SimpleNamespace(result_pickle=self.folder / f"{job_id}.pkl", stderr=self.folder / f"{job_id}.err")
        job: Any = SimpleNamespace(job_id=job_id, paths=paths, result=lambda: None)
        return slurm._QueuedJob(job, self.queue, errors.UncompletedJobError)


def wait(submitter: Submitter, *job_ids: str) -> list[str]:
    reported: list[str] = []
    jobs = [submitter.submit(job_id) for job_id in job_ids]
    slurm.wait_for_jobs(jobs, errors, reported.append, submitter.submit)
    return reported


def test_what_squeue_lists_is_read() -> None:
    listed = "12_0      RUNNING       0   \n12_1    PENDING   3\n13   CANCELLED \n"
    assert slurm.parse_queue(listed) == {
        "12_0": slurm._Look("RUNNING", 0),
        "12_1": slurm._Look("PENDING", 3),
        "13": slurm._Look("CANCELLED", 0),
    }


def test_a_cancelled_job_is_not_waited_for_where_there_is_no_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_squeue(
        tmp_path, monkeypatch,
        "5_0 RUNNING 0\n5_1 RUNNING 0\n5_2 RUNNING 0",
        # SLURM is started anew: nothing is concluded.
        None,
        "5_0 CANCELLED 0\n5_1 RUNNING 0\n5_2 RUNNING 0",
        # 5_1 is forgotten, and nobody has seen its end.
        "5_0 CANCELLED 0\n5_2 TIMEOUT 0",
    )  # fmt: skip
    submitter = Submitter(tmp_path)
    assert wait(submitter, "5_0", "5_1", "5_2") == [
        "job 5_0 was cancelled; 2 still run; the same command continues",
        "job 5_1 was cancelled or its node was lost; 1 still runs; the same command continues",
        "job 5_2 was out of time; none is left; the same command continues",
    ]
    assert submitter.submitted == 0


def test_a_job_that_is_put_back_is_told_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_squeue(
        tmp_path, monkeypatch,
        "7 RUNNING 0", "7 PREEMPTED 0", "7 PENDING 1", "7 RUNNING 1", "7 FAILED 1", "7 RUNNING 2", "7 CANCELLED 2",
    )  # fmt: skip
    again = "job 7 was put back into the queue; its trial goes on with the next worker"
    assert wait(Submitter(tmp_path), "7") == [
        again, again, "job 7 was cancelled; none is left; the same command continues",
    ]  # fmt: skip


def test_a_job_that_was_taken_away_is_replaced_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["7", *(f"r{number}" for number in range(1, slurm.REPLACEMENTS + 1))]
    install_squeue(tmp_path, monkeypatch, "\n".join(f"{name} FAILED 0" for name in names))
    reported = wait(Submitter(tmp_path), "7")
    cause = "ended without a result (its log: {}/{}.err)"
    assert reported == [
        *(
            f"job {job} {cause.format(tmp_path, job)}; job {substitute} takes its place"
            for job, substitute in pairwise(names)
        ),
        f"job {names[-1]} {cause.format(tmp_path, names[-1])}; none is left; the same command continues",
    ]


def test_a_job_with_a_result_has_ended_whatever_squeue_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_squeue(tmp_path, monkeypatch, None)
    assert wait(Submitter(tmp_path, "7"), "7") == []
