"""Train a workload with a submission until it meets the target: `python run.py workload=gpt2 optimizer=lion`.

The command itself is scripts/run.py, which `pacemark run` starts too.
"""

from __future__ import annotations

import sys

from harness.command_line import run_script
from scripts.run import main

if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
