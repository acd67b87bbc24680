"""Time the submissions of some records, alternating, on this machine.

    python scripts/timing.py RECORDS... --out timing.csv [--workloads gpt2 vit] [--submissions adamw lion] [--rounds 15]

Each is built from the configuration in its records and trained for a few short segments, in random order, round by
round: about a minute a workload. scripts/leaderboard.py --timing timing.csv then turns steps-to-target into seconds of
this machine. Only classes of Pacemark and torch are imported for that; --trust allows others, which run with your
rights, so read them first. `torchrun --nproc_per_node=N scripts/timing.py ...` times several GPUs together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.command_line import printable, run_script
from harness.errors import UserError
from harness.processes import is_main_process
from harness.scoring.load_records import load_records
from harness.study.timing_run import time_records
from harness.trial.distributed import shutdown


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+")
    parser.add_argument("--submissions", nargs="+")
    parser.add_argument("--ruleset")
    parser.add_argument("--scale")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trust", action="store_true", help="import classes of other packages that records name")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.overwrite:
        raise UserError(f"--out {options.out} exists; add --overwrite to replace it")
    if options.rounds < 3:
        raise UserError(f"--rounds {options.rounds}: at least 3, or there is no uncertainty")
    records = load_records(
        options.records,
        scale=options.scale,
        ruleset=options.ruleset,
        workloads=options.workloads,
        submissions=options.submissions,
        # Of these, a timing run has one of its own.
        accepted=("torch", "device"),
    )
    for problem in records.problems:
        print(printable(f"{problem.path}: {problem.message}"), file=sys.stderr)
    rows = time_records(
        records, options.records, options.workloads, options.submissions, options.rounds, trust=options.trust
    )
    # Under torchrun every process has measured, and one writes.
    if is_main_process():
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(options.out, index=False)
        print(f"written: {options.out}")
    return shutdown(0)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
