"""What confirmed settings are worth, how much luck their tuning had, and how many seeds a difference needs.

    python scripts/confirm.py power [--difference 5] [--seeds 8] [--workloads gpt2 resnet vit] [--scale mini]
    python scripts/confirm.py results RECORDS [--ruleset confirmed] [--scale mini]

`power` says before a study starts which differences in time it will find, or how many seeds a wanted one (in percent)
needs, from the noise that the measurement of the targets found. `results` reads what
`run.py ... ruleset=confirmed` (or confirmed_external) wrote, and answers two questions for each submission and
workload: how fast these settings are, from the fresh seeds alone; and how fast this budget of tuning is, which adds the
luck of the points that were drawn (docs/statistics.md, section 11). Exit status 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from harness.command_line import run_script
from harness.config.choices import list_choices
from harness.config.compose import load_run, shipped_ruleset
from harness.config.confirmation import tuning_ruleset
from harness.errors import UserError
from harness.scoring.leaderboard import score
from harness.scoring.load_records import load_records
from harness.scoring.power import (
    Luck,
    WorkloadNoise,
    budget_interval,
    detectable_difference,
    seeds_needed,
    tuning_luck,
    workload_noise,
)
from harness.scoring.study_results import timed_trials

WORKLOADS = ("gpt2", "resnet", "vit")


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    power = commands.add_parser("power", help="which differences seeds will find, and how many seeds one needs")
    power.add_argument("--difference", type=float, help="in time, in percent")
    power.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 8, 10, 20, 30])
    power.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list_choices("workload"))
    power.add_argument("--scale", default="mini", choices=list_choices("scale"))
    results = commands.add_parser("results", help="the confirmed settings, and the luck of their tuning")
    results.add_argument("records", nargs="+", type=Path)
    results.add_argument("--ruleset", default="confirmed")
    results.add_argument("--scale", default="mini")
    options = parser.parse_args(arguments)
    if options.command == "power":
        _print_power(options)
    else:
        _print_results(options.records, options.ruleset, options.scale)
    return 0


# ---- power -------------------------------------------------------------------------------------------------------


def _print_power(options: argparse.Namespace) -> None:
    noises = [_noise(name, options.scale) for name in options.workloads]
    for name, noise in zip(options.workloads, noises, strict=True):
        print(f"{name}: sd of log time {noise.sigma:.3f} between seeds, evaluations {100 * noise.spacing:.1f}% apart")
    if options.difference is None:
        if small := [seeds for seeds in options.seeds if seeds < 2]:
            raise UserError(f"--seeds {small[0]}: one seed shows no noise; give 2 or more")
        for seeds in options.seeds:
            percent = 100 * (detectable_difference(noises, seeds) - 1)
            print(f"{seeds} seeds will find differences of {percent:.1f}% or more in four cases of five")
        return
    if not 0 < options.difference < 1000:
        raise UserError(f"--difference {options.difference:g}: must be a percentage above 0 and below 1000")
    needed = seeds_needed(noises, 1 + options.difference / 100)
    if needed is None:
        print(
            f"no number of seeds finds a difference of {options.difference:g}%: the error of the crossings stays; "
            "take workloads with evaluations that are closer together"
        )
    else:
        print(f"a difference of {options.difference:g}% needs {needed} seeds of each of the two submissions")


def _noise(workload: str, scale: str) -> WorkloadNoise:
    # Any target makes the configuration complete: that of a large scale may not have been measured.
    spec = load_run([f"workload={workload}", f"scale={scale}", "optimizer=adamw", "workload.target=0"]).spec
    return workload_noise(spec.target_provenance, spec.eval_every, spec.max_steps)


# ---- results -----------------------------------------------------------------------------------------------------


def _print_results(folders: list[Path], name: str, scale: str) -> None:
    rules = shipped_ruleset(name)
    if rules is None or rules.tuning is None:
        known = [choice for choice in list_choices("ruleset") if (r := shipped_ruleset(choice)) and r.tuning]
        raise UserError(f"--ruleset {name}: confirms nothing; there are {', '.join(known)}")
    board = score(load_records(folders, scale=scale, ruleset=name), mix_machines=True)
    print(f"{board.steps_uncertainty.method}\nIn nominal steps:")
    ends = board.steps_uncertainty.times.set_index(["submission", "workload"])[["low", "high"]]
    ends_of = {key: (float(low), float(high)) for key, (low, high) in zip(ends.index, ends.to_numpy(), strict=True)}
    lucks = _lucks(folders, scale, tuning_ruleset(rules, shipped_ruleset).name)
    for cell in board.times.to_dict("records"):
        name_of_cell = f"{cell['submission']} on {cell['workload']}"
        seeds = f"{cell['studies_reached']} of {cell['studies']} fresh seeds"
        steps = float(cell["steps"])
        if not np.isfinite(steps):
            print(f"{name_of_cell}: {cell['status']} ({seeds})")
            continue
        key = (cell["submission"], cell["workload"])
        low, high = ends_of.get(key, (np.nan, np.nan))
        print(f"{name_of_cell}: these settings {_interval(steps, low, high)} from {seeds}")
        for line in _luck_lines(lucks.get(key), steps, low, high):
            print(f"  {line}")


def _lucks(folders: list[Path], scale: str, ruleset: str) -> dict[tuple[str, str], Luck]:
    """By submission and workload, of the tunings that are recorded and in which a point met the target."""
    try:
        records = load_records(folders, scale=scale, ruleset=ruleset)
    except UserError:
        # The score does not need them, so a folder may have been sent without.
        return {}
    trials = timed_trials(records.trials, None, refuse_mixed_clocks=False, interpolate=True)
    lucks = {}
    for key, of_cell in trials.groupby(["submission", "workload"]):
        times = of_cell["steps"].to_numpy(dtype=float)
        if np.isfinite(times).any():
            lucks[str(key[0]), str(key[1])] = tuning_luck(np.where(np.isfinite(times), times, np.inf))
    return lucks


def _luck_lines(luck: Luck | None, time: float, low: float, high: float) -> list[str]:
    if luck is None:
        return ["this budget of tuning: not known, as its records are not in these folders or none met the target"]
    points = len(luck.factors)
    lines = [
        f"luck of tuning: the best of {points} points, drawn anew from these, needs {luck.expected:.3f} times as long "
        f"as the best of these (up to {luck.quantile(0.975):.3f}), and meets no target in {100 * luck.missed:.1f}%"
    ]
    if np.isfinite(low):
        ends = budget_interval(low, high, luck)
        lines.append(f"this budget of tuning {_interval(time * luck.expected, *ends)}")
    return lines


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:,.0f}" + (f" ({low:,.0f} to {high:,.0f})" if np.isfinite(low) else " (no interval)")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
