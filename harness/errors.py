"""All errors that Pacemark raises on purpose, with one base class.

    PacemarkError
        UserError           bad input; lists every problem with its remedy (exit status 2)
            ManifestError   a manifest.json that cannot be used
        WorkloadError       data or specification of a workload are missing or wrong
        PreparationError    a data set could not be prepared or read
        UndeclaredNeed      a submission used a capability that it did not declare
        LeaseLost           another process has taken over the folder of a trial
        ProcessKilled       a process of a trial was killed from outside
        CheckFailed         a conformance check of a submission failed

Code that uses Pacemark as a library catches `PacemarkError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PacemarkError(Exception):
    """Base class of all errors that are raised on purpose."""


class UserError(PacemarkError):
    """Bad input. `messages` holds all problems that were found; each names the key, the value and the remedy."""

    def __init__(self, messages: str | Iterable[str]) -> None:
        self.messages = [messages] if isinstance(messages, str) else list(messages)
        super().__init__("\n".join(self.messages))


class ManifestError(UserError):
    """A manifest.json is damaged, of another format, or lacks a key; the message names the key."""


class WorkloadError(PacemarkError):
    """Data or specification of a workload are missing or wrong; the message says what to do."""


class PreparationError(PacemarkError):
    """A source or a prepared data set is missing or damaged; the message names key, value and remedy."""


class UndeclaredNeed(PacemarkError):
    """A submission used a capability that it did not declare.

    asked: the capability, in words. need: the name and the value of the missing `harness.interface.Need`.
    """

    def __init__(self, asked: str, need: tuple[str, str], submission: str) -> None:
        name, value = need
        super().__init__(
            f"{submission} asked for {asked} without declaring it; add Need.{name} to its `needs` "
            f"(or `optimizer.needs=[{value}]` in its YAML)"
        )


class LeaseLost(PacemarkError):
    """Another process has taken over the folder of a trial, because this one missed its heartbeats."""


class ProcessKilled(PacemarkError):
    """A process of a trial was killed from outside, by the system when memory ran out or by a scheduler; the trial can
    be continued."""


class CheckFailed(PacemarkError):
    """A conformance check of a submission failed; the message says what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt name: "did you mean `lion`?" for a close one, else the list of known names, or of a
    long list those that come nearest."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    if len(known) > 30:
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
        return f"the nearest of {len(known)} are {', '.join(nearest)}"
    return f"known are {', '.join(known)}" if known else "there are none"


def shorten(value: Any) -> str:
    """A value for a message: of a long one, the beginning."""
    text = str(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
