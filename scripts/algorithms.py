"""Make the tables of docs/algorithms.md: one row for each file of configs/optimizer/.

    python scripts/algorithms.py [--check] [--times FILE]

--times: what `python benchmarks/optimizer_step.py --out FILE` wrote. --check writes nothing and ends with status 1 if
the document is not what the YAMLs give. About a minute: every submission is built and makes a few steps.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import torch

from harness.algorithms import algorithms, read_times, renewed, tables
from harness.problems import reporting

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "algorithms.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    parser.add_argument("--times", type=Path, default=ROOT / "benchmarks" / "optimizer_step_mini.csv", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = read_times(options.times)
    committed = DOCUMENT.read_text()
    made = renewed(committed, tables(list(algorithms()), times))
    if not options.check:
        DOCUMENT.write_text(made)
        print(f"written: {DOCUMENT.relative_to(ROOT)}")
        return 0
    differing = list(difflib.unified_diff(committed.splitlines(), made.splitlines(), "docs", "YAMLs", lineterm="", n=0))
    print("\n".join(differing))
    print("docs/algorithms.md", "differs from" if differing else "is", "what the YAMLs give")
    if differing:
        print("run: python scripts/algorithms.py")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(reporting(main))
