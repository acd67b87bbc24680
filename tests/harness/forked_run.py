"""`run.py` whose trials are forked like itself: `ForkedProcess(forked_run.__name__, *arguments)`."""

from __future__ import annotations

import sys

from harness.command_line import run_script
from harness.study.trial_process import TrialProcess
from scripts.run import main
from tests import forked

if __name__ == "__main__":
    TrialProcess._start = staticmethod(forked.start_trial)
    sys.exit(run_script(main, sys.argv[1:]))
