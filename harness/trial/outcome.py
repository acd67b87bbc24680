"""How a trial ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.records.status import Status


@dataclass
class Outcome:
    """A status, and why."""

    status: Status
    stop_reason: str | None = None
    """In words, where the status alone does not tell."""
    traceback: str | None = None
    """Of the exception that ended the trial."""
    lost_ranks: list[int] = field(default_factory=list)
    """Processes that were lost; such a trial can be continued."""
