"""Pacemark as an installed package: its public names, and the command `pacemark`.

For authors of submissions and workloads: `Setup`, `StepContext`, `Need`, `Submission`, `OptimizerSubmission`,
`Wrapper`, `Role`, `Schedule`, `Rule`, `Bucket`, `MatrixRule`, `MatrixSubmission`, `Workload`, `WorkloadSpec`.
For readers of results: `load_records`, `load_curves`, `score`, `list_submissions`. Everything else is internal and may
change without notice. The names are loaded on first use, since most of them bring torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A wheel holds one import name: harness, workloads, submissions and scripts are common names, so they lie in this
# folder and become importable with `import pacemark`. They come first on the path, since the code relies on them.
# In a clone they lie beside this package and are importable already.
_INSTALLED = Path(__file__).parent / "_lib"
if _INSTALLED.is_dir() and str(_INSTALLED) not in sys.path:
    sys.path.insert(0, str(_INSTALLED))

if TYPE_CHECKING:
    from harness.interface import Need as Need
    from harness.interface import OptimizerSubmission as OptimizerSubmission
    from harness.interface import Role as Role
    from harness.interface import Schedule as Schedule
    from harness.interface import Setup as Setup
    from harness.interface import StepContext as StepContext
    from harness.interface import Submission as Submission
    from harness.interface import Workload as Workload
    from harness.interface import WorkloadSpec as WorkloadSpec
    from harness.interface import Wrapper as Wrapper
    from pacemark.results import list_submissions as list_submissions
    from pacemark.results import load_curves as load_curves
    from pacemark.results import load_records as load_records
    from pacemark.results import score as score
    from submissions.matrices import MatrixRule as MatrixRule
    from submissions.matrices import MatrixSubmission as MatrixSubmission
    from submissions.rule import Bucket as Bucket
    from submissions.rule import Rule as Rule

_MODULE_OF = {
    **dict.fromkeys(
        (
            "Need", "OptimizerSubmission", "Role", "Schedule", "Setup", "StepContext", "Submission", "Workload",
            "WorkloadSpec", "Wrapper",
        ),
        "harness.interface",
    ),
    **dict.fromkeys(("Rule", "Bucket"), "submissions.rule"),
    **dict.fromkeys(("MatrixRule", "MatrixSubmission"), "submissions.matrices"),
    **dict.fromkeys(("list_submissions", "load_curves", "load_records", "score"), "pacemark.results"),
}  # fmt: skip
__all__ = sorted(["__version__", *_MODULE_OF])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from harness.version import package_version

        return package_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are in __all__")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
