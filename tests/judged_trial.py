"""The process of a judged trial, forked, with the submission's process forked too.

    python -m tests.judged_trial

Reads a configuration (`Run`, as JSON) from standard input and runs it; the judge has not imported the submission.
"""

from __future__ import annotations

import sys

from harness.config.schema import Run
from harness.trial import remote_training
from harness.trial.trial import run_trial
from tests import forked

if __name__ == "__main__":
    remote_training.launch = forked.launch_trainee  # type: ignore[assignment]
    run_trial(Run.model_validate_json(sys.stdin.read()), retry="retry" in sys.argv)
