"""How a trial ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

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


# What libraries below torch say when they get no memory, and torch itself where it raises no OutOfMemoryError.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)


def out_of_memory_cause(caught: BaseException) -> BaseException | None:
    """The exception that says that memory ran out: `caught`, or one that led to it; None if memory was not the cause.

    torch.compile wraps it, cuBLAS, cuDNN and NCCL say it in words, and so does torch's allocator on a CPU.
    """
    seen: set[int] = set()
    error: BaseException | None = caught
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
            return error
        error = error.__cause__ or error.__context__
    return None
