"""Make the table of docs/recipes.md: what every submission did as shipped, from the records of one seed.

    python scripts/recipes.py [--check]

--check writes nothing and ends with status 1 if the document is not what the records give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import generated, reading, recipes
from harness.problems import reporting

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    options = parser.parse_args()
    records = reading.read([ROOT / "results" / name / "records" for name in ("recipes", "untuned")])
    records.trials = records.trials[records.trials["study"] == 0]  # the baselines have three
    made = recipes.table(records)
    return generated.renew(ROOT / "docs" / "recipes.md", made, "python scripts/recipes.py", check=options.check)


if __name__ == "__main__":
    sys.exit(reporting(main))
