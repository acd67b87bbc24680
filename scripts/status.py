"""What a folder of records holds at this moment: trials planned, running and finished, and the time left.

    python scripts/status.py [RECORDS] [--every]

Reads only, so it can be asked while workers run. Exit status 1 if a trial failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from harness.problems import reporting
from harness.status import print_status, survey


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=Path("results/records"))
    parser.add_argument("--every", action="store_true", help="a line for every trial")
    options = parser.parse_args()
    trials, problems = survey(options.records)
    print_status(Console(highlight=False, soft_wrap=True), trials, options.every)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return 1 if any(trial.state.name in ("failed", "out_of_memory") for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(reporting(main))
