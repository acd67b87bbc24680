"""Time the submissions of some records, alternating, on this machine.

    python scripts/timing.py RECORDS... --out timing.csv [--workloads gpt2 vit] [--submissions adamw lion] [--rounds 15]

Each is built from the configuration in its records and trained for a few short segments, in random order, round by
round: about a minute a workload. scripts/leaderboard.py --timing timing.csv then turns steps-to-target into seconds of
this machine. `torchrun --nproc_per_node=N scripts/timing.py ...` times several GPUs together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.problems import UserError, reporting
from harness.ranks import end, is_first
from harness.reading import read
from harness.timing import measure_records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+")
    parser.add_argument("--submissions", nargs="+")
    parser.add_argument("--ruleset")
    parser.add_argument("--scale")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    options = parser.parse_args()
    if options.out.exists() and not options.overwrite:
        raise UserError(f"--out {options.out} exists; add --overwrite to replace it")
    if options.rounds < 3:
        raise UserError(f"--rounds {options.rounds}: at least 3, or there is no uncertainty")
    records = read(options.records, scale=options.scale, ruleset=options.ruleset)
    rows = measure_records(records, options.workloads, options.submissions, options.rounds)
    if is_first():
        options.out.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(options.out, index=False)
        print(f"written: {options.out}")
    return end(0)


if __name__ == "__main__":
    sys.exit(reporting(main))
