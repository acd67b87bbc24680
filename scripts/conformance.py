"""Check what every submission must do, on a small problem: about a second each, and no record is written.

    python scripts/conformance.py [NAME ...] [KEY=VALUE ...]

NAME: of configs/optimizer/, your own included; all of them by default. KEY=VALUE as for run.py.
The checks are in harness/trial/conformance.py. Exit status: 0 all passed, 1 something failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys

from rich.table import Table

from harness.command_line import run_script
from harness.config.choices import TEMPLATES, list_choices
from harness.display import make_console
from harness.trial.conformance import CHECKS, make_subject, run_checks


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NAME or KEY=VALUE")
    words = parser.parse_args(arguments).words
    settings = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    names = names or [name for name in list_choices("optimizer") if name not in TEMPLATES]
    # All of them first, so that bad input is reported before minutes of checks.
    subjects = {name: make_subject(name, *settings) for name in names}
    table = Table(box=None, pad_edge=False)
    for heading in ("submission", *CHECKS):
        table.add_column(heading, no_wrap=True)
    failures = {name: run_checks(subject) for name, subject in subjects.items()}
    for name, failed in failures.items():
        table.add_row(name, *("[red]failed[/red]" if check in failed else "ok" for check in CHECKS))
    console = make_console()
    # Its columns are not folded, and in a narrower terminal the last ones would be missing.
    console.width = max(console.width, 120)
    console.print(table)
    for name, failed in failures.items():
        for check, message in failed.items():
            console.print(f"{name}, {check}: {message}", markup=False)
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
