"""What a folder of records holds at this moment: trials planned, running and finished, and the time left.

    python scripts/status.py [RECORDS] [--every] [--watch [SECONDS]]

Reads only, so it can be run while workers run, on any machine that sees the records. --watch shows the running trials
until all are over or Ctrl-C. docs/studies.md explains the columns. Exit status 1 if a trial failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.command_line import run_script
from harness.display import make_console
from harness.errors import UserError
from harness.records.status import CRASHED
from harness.study.progress import REFRESH_SECONDS, print_status, watch_records
from harness.study.status import survey_records


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, default=Path("results/records"))
    parser.add_argument("--every", action="store_true", help="a line for every trial")
    parser.add_argument("--watch", nargs="?", type=float, const=REFRESH_SECONDS, metavar="SECONDS",
                        help=f"go on until all are over, with so many seconds between two looks "
                        f"(default: {REFRESH_SECONDS:g})")  # fmt: skip
    options = parser.parse_args(_with_seconds(arguments))
    console = make_console()
    messages: list[str] = []
    if options.watch is None:
        trials, messages = survey_records(options.records)
    elif options.watch > 0:
        trials = watch_records(console, options.records, options.watch)
    else:
        raise UserError(f"--watch {options.watch:g}: give the seconds between two looks, above 0")
    print_status(console, trials, options.every)
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    return int(any(trial.state.name in CRASHED for trial in trials))


def _with_seconds(arguments: list[str]) -> list[str]:
    """The arguments with a number after --watch, so that a folder that follows is not taken for one."""
    if "--watch" not in arguments:
        return arguments
    place = arguments.index("--watch") + 1
    try:
        float(arguments[place])
    except (IndexError, ValueError):
        return [*arguments[:place], f"{REFRESH_SECONDS}", *arguments[place:]]
    return arguments


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
