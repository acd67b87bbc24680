"""The rule that `pruning=` names, for `harness.trial.trial.run_trial`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.config.schema import Run
from harness.records.layout import RecordPath

if TYPE_CHECKING:
    from harness.trial.trial import ShouldStop


def make_should_stop(run: Run, path: RecordPath) -> ShouldStop | None:
    """The stopping rule of a trial whose record lies at `path`; None where it is not pruned."""
    if run.pruning == "none":
        return None
    # Brings the libraries of tables, which trials without pruning need not wait for.
    from harness.study.pruning_online import OnlinePruner

    return OnlinePruner(run, path).stop_reason
