"""How often the process of a trial was killed from outside: by the system when memory ran out, by a scheduler, by hand.

Such a kill says nothing of the submission. It is no crash and uses up no retry; the trial goes on from its checkpoint.
A process that ended before its trial had a record, by whatever signal, counts alike: there is no record yet that could
tell of a crash. A trial that is killed again and again without getting further would keep a worker busy for ever, so
the kills are counted in a file beside its record, which all workers see, and which goes when the trial ends.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

from harness.files import write_atomically
from harness.records.layout import KILLS, RecordPath

KILL_LIMIT = 5
"""A trial that was killed so often without a new checkpoint is left to the next command."""
OWN_SIGNALS = (
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS,
)  # fmt: skip
"""Signals of the process's own making. All others come from outside, such as SIGUSR2, by which SLURM warns a job of its
end, or SIGXCPU at a limit."""


def is_kill(status: int | None) -> bool:
    """Whether a process with this exit status, negative for a signal, was killed from outside."""
    return status is not None and status < 0 and -status not in OWN_SIGNALS


def count_kills(path: RecordPath) -> int:
    """How often the trial was killed since its last checkpoint."""
    return _read(path)[0]


def last_cause(path: RecordPath) -> str:
    """How the process of the trial ended the last time; empty where that is not known."""
    try:
        return str(json.loads(_file(path).read_bytes()).get("cause", ""))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def note_kill(path: RecordPath, cause: str) -> int:
    """Count a kill; how many there are now since the last checkpoint. cause: part of a sentence. To be called while
    holding the trial's lease. Raises OSError where the folder cannot be written."""
    count, former = _read(path)
    checkpoint = _checkpoint(path)
    count = count + 1 if checkpoint == former else 1
    write_atomically(_file(path), json.dumps({"kills": count, "checkpoint": checkpoint, "cause": cause}))
    return count


def forget_kills(path: RecordPath) -> None:
    """Give the trial all of its attempts again. Raises OSError where the folder cannot be written."""
    _file(path).unlink(missing_ok=True)


def _file(path: RecordPath) -> Path:
    return path.folder / KILLS


def _checkpoint(path: RecordPath) -> list[int] | None:
    """What tells a checkpoint from the one before."""
    try:
        status = path.checkpoint.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read(path: RecordPath) -> tuple[int, list[int] | None]:
    """The count, and the checkpoint that it was counted at; 0 where nothing can be read."""
    try:
        content = json.loads(_file(path).read_bytes())
        return int(content["kills"]), content["checkpoint"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0, None
