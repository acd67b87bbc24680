"""Make the tables of docs/algorithms.md: one row for each file of configs/optimizer/.

    python scripts/algorithms.py [--check] [--times FILE]

--times: what `python benchmarks/optimizer_step.py --out FILE` wrote. --check writes nothing and ends with status 1 if
the document is not what the YAMLs give. About a minute: every submission is built and makes a few steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from harness.board.algorithm_table import describe_algorithm, format_algorithms, read_times
from harness.board.generated_docs import update_document
from harness.command_line import run_script
from harness.config.choices import TEMPLATES, list_choices
from harness.trial.state_size import count_state

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    parser.add_argument("--times", type=Path, default=ROOT / "benchmarks" / "optimizer_step_mini.csv", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times = read_times(options.times)
    # `any` is no submission: its class is given on the command line.
    names = [name for name in list_choices("optimizer") if name not in TEMPLATES]
    algorithms = [describe_algorithm(run, state) for run, state in count_state(names)]
    tables = format_algorithms(algorithms, times)
    return update_document(ROOT / "docs" / "algorithms.md", tables, "python scripts/algorithms.py", check=options.check)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
