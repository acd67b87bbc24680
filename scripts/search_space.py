"""Show what a tuner may try with a submission, and the points that the first trials of a study try. Trains nothing.

    python scripts/search_space.py OPTIMIZER [--study 0] [--trials 5] [KEY=VALUE ...]

KEY=VALUE as for run.py; what is set there stays fixed at every point.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.table import Table

from harness.command_line import run_script
from harness.config.compose import load_run
from harness.config.schema import Run
from harness.config.search_space import SearchSpace, parse_search_space
from harness.config.study_trials import configure_trial, list_trials
from harness.display import make_console


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer")
    parser.add_argument("--study", type=int, default=0, help="study seed")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    # Intermixed, since a KEY=VALUE can stand before or after an option.
    options = parser.parse_intermixed_args(arguments)
    settings = [*options.settings, f"optimizer={options.optimizer}", f"seed={options.study}"]
    if not any(setting.startswith("workload=") for setting in settings):
        # Any will do: a search space is independent of the workload.
        settings.append("workload=gpt2")
    run = load_run([*settings, "ruleset=external", f"ruleset.trials={options.trials}", "ruleset.studies=1"])
    # A submission without one was refused by load_run.
    space = parse_search_space(run.optimizer.search_space)
    console = make_console()
    for dimension in space.dimensions:
        values = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in dimension.values)
        console.print(f"{dimension.name:36} {dimension.kind:14} {values}", markup=False)
    if space.points:
        console.print(f"a list of {len(space.points)} points, in another order in every study")
    table = Table(box=None, pad_edge=False)
    rows = [_drawn_values(configure_trial(run, seed, number), space) for seed, number in list_trials(run)]
    for heading in ("trial", *rows[0]):
        table.add_column(heading)
    for number, row in enumerate(rows, 1):
        table.add_row(str(number), *row.values())
    console.print(f"study {options.study} of {run.optimizer.name}")
    console.print(table)
    return 0


def _drawn_values(trial: Run, space: SearchSpace) -> dict[str, str]:
    """The trial's values of all that the space sets."""
    names = {str(dimension.path[1]) for dimension in space.dimensions if dimension.path[0] == "hyperparameters"}
    names |= {name for point in space.points for name in point.get("hyperparameters", {})}
    parts = {dimension.path[0] for dimension in space.dimensions} | {part for point in space.points for part in point}
    hyperparameters = trial.optimizer.effective_hyperparameters
    others = trial.schedule.model_dump() | {"clip_norm": trial.optimizer.clip_norm}
    values = {name: hyperparameters[name] for name in sorted(names)}
    values |= {str(part): others[str(part)] for part in sorted(parts - {"hyperparameters"})}
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
