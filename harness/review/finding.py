"""What a review finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """What follows from a finding."""

    REFUSED = "refused"
    """No board takes the trial, or, of a finding about several, the records together."""
    WARNING = "warning"
    """A board takes it and lists the finding, since a person has to look."""
    NOTE = "note"
    """Nothing is wrong; a reader may want to know."""


@dataclass(frozen=True)
class Finding:
    """One finding of a review."""

    path: str
    """Of the trial's folder below the folder of records, or the name of a submission or workload."""
    severity: Severity
    kind: str
    """Name of the check: identity, columns, evidence, ..."""
    message: str
    """Key, value, what was expected, and what to do."""
    trial: int | None = None
    """Position of the trial in the list that was reviewed; None for a finding about several."""


@dataclass(frozen=True)
class Remark:
    """A finding about one trial before it is known which: what a check of a single record yields."""

    severity: Severity
    message: str


def refused(message: str) -> Remark:
    """A remark for which no board takes the trial."""
    return Remark(Severity.REFUSED, message)


def warning(message: str) -> Remark:
    """A remark that a person has to look at."""
    return Remark(Severity.WARNING, message)


def note(message: str) -> Remark:
    """A remark for information."""
    return Remark(Severity.NOTE, message)
