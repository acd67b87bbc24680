"""The statuses of a trial, and the groups that tables and workers sort them into."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """How a trial stands. The first eight are written into manifests, the last three are found when reading."""

    RUNNING = "running"
    REACHED = "reached"
    """The target was met."""
    EXHAUSTED = "exhausted"
    """The budget was used up first."""
    DIVERGED = "diverged"
    """The loss or the metric became non-finite."""
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    """An exception; its traceback is in the manifest."""
    PRUNED = "pruned"
    """Stopped by the rule that `pruning=` names, before its budget was used up: how it would have ended is unknown."""
    STOPPED = "stopped"
    """Interrupted by a signal; the same command continues it."""

    MISSING = "missing"
    """The folder has no CSV of evaluations, or one without rows."""
    INVALID = "invalid"
    """Refused when it was read; the list of problems says why."""
    DUPLICATE = "duplicate"
    """Another folder of the same trial was taken."""

    @property
    def is_finished(self) -> bool:
        """Whether the trial has ended with a result; a crash is one."""
        return self in SCORED

    @property
    def is_crash(self) -> bool:
        """Whether the trial broke down, so that it may be tried again. Divergence is a result, no crash."""
        return self in CRASHED


SCORED = (
    Status.REACHED,
    Status.EXHAUSTED,
    Status.DIVERGED,
    Status.OUT_OF_MEMORY,
    Status.FAILED,
    Status.PRUNED,
)
"""Statuses with which a trial ends; all of them count in a table."""
UNFINISHED = (Status.RUNNING, Status.STOPPED)
"""A table shows them together, as `unfinished`."""
UNUSABLE = (Status.MISSING, Status.INVALID, Status.DUPLICATE)
"""Given when records are read."""
CRASHED = (Status.OUT_OF_MEMORY, Status.FAILED)
"""A worker tries such a trial again."""
BROKEN_DOWN = (Status.DIVERGED, *CRASHED, Status.MISSING, Status.INVALID)
"""Trials that had no chance to meet the target any more, long before their budget was used up."""
DISPLAY_ORDER: tuple[str, ...] = (
    Status.REACHED,
    Status.EXHAUSTED,
    Status.PRUNED,
    Status.STOPPED,
    Status.DIVERGED,
    Status.OUT_OF_MEMORY,
    Status.FAILED,
    "unfinished",
    Status.MISSING,
    Status.INVALID,
)
"""The order in which tables list the counts, the good ones first."""
