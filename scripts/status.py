"""What a folder of records holds at this moment: trials planned, running and finished, and the time left.

    python scripts/status.py [RECORDS] [--every]

Reads only, so it can be run while workers run. Exit status 1 if a trial failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from harness.errors import run_script
from harness.records.status import CRASHED
from harness.study.status import print_status, survey_records


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=Path("results/records"))
    parser.add_argument("--every", action="store_true", help="a line for every trial")
    options = parser.parse_args(arguments)
    trials, messages = survey_records(options.records)
    print_status(Console(highlight=False, soft_wrap=True), trials, options.every)
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    return int(any(trial.state.name in CRASHED for trial in trials))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
