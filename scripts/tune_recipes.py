"""Choose the recipes of submissions by the same small budget for each.

    python scripts/tune_recipes.py NAME ... [--workloads gpt2,resnet] [--points 8] [--workers 2] [--write]

The procedure is in harness/study/recipe_procedure.py: the present recipe and the first points of the search space, over
the whole budget of every workload, on one seed. It is a resumable job of the ledger: trials that are finished in
--records are not run again, and scripts/status.py shows how far it is. With --write, the best candidate becomes the
recipe in the submission's YAML, with its provenance. NAME may be a pattern such as `mars_*`.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from harness.command_line import run_script
from harness.config.choices import TEMPLATES, list_choices
from harness.display import make_console
from harness.errors import UserError, did_you_mean
from harness.study.recipe_procedure import recipe_file, tune_recipes, write_recipe


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", nargs="+", metavar="NAME")
    parser.add_argument("--workloads", default="gpt2,resnet")
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--records", type=Path, default=Path("results/recipe_tuning/records"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--machine", default="cpu-1-thread", help="folder of the records; steps do not depend on it")
    parser.add_argument("--write", action="store_true", help="write recipe and provenance into the YAML")
    options = parser.parse_args(arguments)
    if options.points < 1:
        raise UserError(f"--points {options.points}: a procedure needs at least one point; give 1 or more")
    names = _match_names(options.submissions)
    console = make_console()

    def report(line: str) -> None:
        console.print(line, markup=False)

    shared = [f"records={options.records}", f"executor.workers={options.workers}", f"machine={options.machine}"]
    tuned = tune_recipes(names, options.workloads.split(","), options.points, shared, options.machine, report)
    for result in tuned:
        for candidate in result.candidates:
            listed = ", ".join(f"{workload} {outcome}" for workload, outcome in candidate.outcomes.items())
            report(f"{result.submission:24} {candidate.name:>6}  cost {candidate.cost:.3f}  {listed}")
        if options.write:
            path = recipe_file(result.submission)
            write_recipe(path, result)
            report(f"written: {path}")
    return 0


def _match_names(patterns: list[str]) -> list[str]:
    """The submissions that the patterns name, each once. Raises UserError for a pattern that names none."""
    choices = [name for name in list_choices("optimizer") if name not in TEMPLATES]
    names: list[str] = []
    for pattern in patterns:
        matched = [name for name in choices if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(f"{pattern}: no submission has this name; {did_you_mean(pattern, choices)}")
        names += [name for name in matched if name not in names]
    return names


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
