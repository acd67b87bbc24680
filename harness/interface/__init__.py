"""What authors of submissions and workloads import: needs, roles, schedules, the data order, the step, the two bases.

It may import errors, hashing, seeding and processes of the harness, and nothing of the other rooms. The names below can
be imported from here; they are loaded on first use, since most of them bring torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Type checkers and editors do not run __getattr__; `as` marks the names as re-exported.
if TYPE_CHECKING:
    from harness.errors import WorkloadError as WorkloadError
    from harness.interface.data_order import ExampleStream as ExampleStream
    from harness.interface.data_order import Selection as Selection
    from harness.interface.needs import Need as Need
    from harness.interface.on_device import sample_classes as sample_classes
    from harness.interface.on_device import to_device as to_device
    from harness.interface.ranks import Ranks as Ranks
    from harness.interface.roles import MATRIX_ROLES as MATRIX_ROLES
    from harness.interface.roles import Role as Role
    from harness.interface.schedules import Schedule as Schedule
    from harness.interface.step import StepContext as StepContext
    from harness.interface.step import WrappedContext as WrappedContext
    from harness.interface.step import swapped as swapped
    from harness.interface.submission import OptimizerSubmission as OptimizerSubmission
    from harness.interface.submission import Setup as Setup
    from harness.interface.submission import Submission as Submission
    from harness.interface.submission import Wrapper as Wrapper
    from harness.interface.workload import Batch as Batch
    from harness.interface.workload import Split as Split
    from harness.interface.workload import Workload as Workload
    from harness.interface.workload import WorkloadSpec as WorkloadSpec

_MODULE_OF = {
    "WorkloadError": "harness.errors",
    **dict.fromkeys(("ExampleStream", "Selection"), "harness.interface.data_order"),
    "Need": "harness.interface.needs",
    "Ranks": "harness.interface.ranks",
    **dict.fromkeys(("MATRIX_ROLES", "Role"), "harness.interface.roles"),
    "Schedule": "harness.interface.schedules",
    **dict.fromkeys(("StepContext", "WrappedContext", "swapped"), "harness.interface.step"),
    **dict.fromkeys(("OptimizerSubmission", "Setup", "Submission", "Wrapper"), "harness.interface.submission"),
    **dict.fromkeys(("sample_classes", "to_device"), "harness.interface.on_device"),
    **dict.fromkeys(("Batch", "Split", "Workload", "WorkloadSpec"), "harness.interface.workload"),
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
