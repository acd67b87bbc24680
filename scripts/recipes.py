"""Make the table of docs/recipes.md: what every submission does as shipped, from the records of one seed.

    python scripts/recipes.py [--check]

--check writes nothing and ends with status 1 if the document is not what the records give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.board.generated_docs import update_document
from harness.board.recipe_table import format_recipes
from harness.command_line import run_script
from harness.scoring.load_records import load_records

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    options = parser.parse_args(arguments)
    records = load_records([ROOT / "results" / name / "records" for name in ("recipes", "untuned")])
    # The baselines have three studies, the others one.
    records.trials = records.trials[records.trials["study"] == 0]
    table = format_recipes(records)
    return update_document(ROOT / "docs" / "recipes.md", table, "python scripts/recipes.py", check=options.check)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
