"""Is submission A faster than B?

    python scripts/compare.py A B [--records DIR...] [--timing FILE | --time] [--scale mini] [--ruleset quick]

Looks in your records (results/records) and in those that come with Pacemark: of recipes as they are (ruleset quick),
or with --ruleset external of tuned submissions. Compares in nominal steps, which hold on any machine, and in seconds
from a timing run on one machine: of a file of scripts/timing.py, or measured now with --time (about a minute a
workload). Exit status 0 whatever the verdict.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from harness.command_line import printable, run_script
from harness.errors import UserError, did_you_mean
from harness.processes import SOURCE_ROOT
from harness.records.status import Status
from harness.review.settings import MIXABLE
from harness.scoring.leaderboard import score
from harness.scoring.load_records import Records, load_records
from harness.scoring.timings import Timings, read_timings
from harness.scoring.uncertainty import Uncertainty

MOST_PROBLEMS = 8
"""Lines about refused records that are printed."""
OWN_RECORDS = Path("results/records")
"""Where runs write by default, below the working folder."""
SHIPPED_RECORDS = tuple(SOURCE_ROOT / "results" / name / "records" for name in ("untuned", "external"))
"""Of the baselines; they come with Pacemark."""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    existing = [path for path in (OWN_RECORDS, *SHIPPED_RECORDS) if path.is_dir()]
    parser.add_argument(
        "--records", nargs="+", type=Path, default=existing, help="default: yours and the committed ones"
    )
    parser.add_argument("--scale")
    parser.add_argument("--ruleset")
    parser.add_argument("--timing", type=Path, help="a file of scripts/timing.py that holds both")
    parser.add_argument("--time", action="store_true", help="time both on this machine now")
    parser.add_argument("--trust", action="store_true", help="--time may import classes that are not Pacemark's")
    parser.add_argument("--mix", choices=MIXABLE, nargs="+", default=[],
                        help="compare records that differ in these all the same")  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.records:
        raise UserError(f"no records in {OWN_RECORDS}; give their folders with --records")
    # By identity: the default itself, so the user has named no folders. The committed records are of several rulesets.
    if options.records is existing and options.ruleset is None:
        options.ruleset = "quick"
    records = load_records(
        options.records,
        scale=options.scale,
        ruleset=options.ruleset,
        submissions=[options.a, options.b],
        # Nominal steps hardly depend on them, and other people's records are of other machines.
        accepted={*options.mix, "torch", "device", "threads"},
    )
    _check_names(records, options.a, options.b)
    _print_problems(records, options.a, options.b)
    _refuse_without_trials(records, options.a, options.b)
    # Only the two: with others the variance would be pooled over them and the correction be for all pairs.
    records.trials = records.trials[records.trials["submission"].isin([options.a, options.b])]
    # Of this board only the steps are taken, which hold on any machine.
    # A study that has not been made is no evidence of a difference.
    board = score(records, baseline=options.b, mix_machines=True, count_absent_studies=False)
    _report("nominal steps", board.steps_uncertainty, board.times, "steps", options)
    timings = read_timings(options.timing) if options.timing else None
    by_submission = records.trials.groupby("submission")["workload"].unique()
    shared = sorted(set(by_submission[options.a]) & set(by_submission[options.b]))
    if shared and (options.time or (timings is None and _wants_timing())):
        # Brings torch, which a comparison in steps need not wait for.
        from harness.study.timing_run import time_records

        timings = Timings.from_rows(
            time_records(records, options.records, shared, [options.a, options.b], trust=options.trust)
        )
    if timings is None or not shared:
        print(
            "\nIn seconds: not compared, since clocks of different runs do not compare; --time measures both here now."
        )
        return 0
    # A timing run has the workloads that both trained, and `score` refuses trials that were not timed.
    board = score(records.select_workloads(shared), baseline=options.b, timings=timings, count_absent_studies=False)
    print(f"\n{timings.sentence}")
    _report("seconds", board.uncertainty, board.times, "seconds", options)
    return 0


def _refuse_without_trials(records: Records, a: str, b: str) -> None:
    """Raise UserError for a submission of which every trial was refused."""
    usable = set(records.trials.loc[records.trials["status"] != Status.INVALID, "submission"])
    messages = [
        f"{name}: every trial of it was refused; python scripts/audit.py gives all reasons"
        for name in (a, b)
        if name not in usable
    ]
    if messages:
        raise UserError(messages)


def _print_problems(records: Records, a: str, b: str) -> None:
    """What was refused or is to be known of the two, which a board would list."""
    lines = []
    for problem in records.problems:
        parts = problem.path.split("/")
        is_of_two = any(name in parts for name in (a, b)) or problem.path.startswith((f"{a} on ", f"{b} on "))
        if (is_of_two or problem.path in set(records.trials["workload"])) and not problem.message.startswith("note:"):
            lines.append(printable(f"{problem.path}: {problem.message}"))
    for line in lines[:MOST_PROBLEMS]:
        print(line)
    if len(lines) > MOST_PROBLEMS:
        print(f"and {len(lines) - MOST_PROBLEMS} more; python scripts/audit.py lists them")


def _check_names(records: Records, a: str, b: str) -> None:
    known = sorted(records.trials["submission"].unique())
    messages = [f"{name}: no such submission; {did_you_mean(name, known)}" for name in (a, b) if name not in known]
    if a == b:
        messages.append(f"{a} and {b} are the same submission; name two")
    if messages:
        raise UserError(messages)


def _wants_timing() -> bool:
    # In a pipe or a scheduler's job a question would wait for ever.
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return (
        input("\nCompare in seconds as well? Times both on this machine, about a minute a workload [y/N] ").lower()
        == "y"
    )


def _report(unit: str, uncertainty: Uncertainty, times: pd.DataFrame, column: str, options: argparse.Namespace) -> None:
    """Print the comparison in one unit: each workload, then all together. column: the one of `times` with the times."""
    print(f"\nIn {unit}, {options.a} against {options.b} (ratio below 1: {options.a} is faster)\n{uncertainty.method}")
    cells = times.set_index(["workload", "submission"])
    workloads = cells.index.get_level_values("workload").unique()
    width = max(10, *map(len, workloads))
    for workload in workloads:
        of_a, of_b = (cells.loc[(workload, name)] for name in (options.a, options.b))
        values = ", ".join(_value(name, cell, column) for name, cell in ((options.a, of_a), (options.b, of_b)))
        row = _only_row(uncertainty.pairs_by_workload[uncertainty.pairs_by_workload["workload"] == workload])
        verdict = "held out, no part of the verdict" if of_a["held_out"] else _verdict(row, options)
        print(f"  {workload:{width}} {values}: {verdict}")
    print(f"  {'overall':{width}} {_verdict(_only_row(uncertainty.pairs), options)}")
    if np.isfinite(uncertainty.detectable):
        percent = 100 * (uncertainty.detectable - 1)
        print(f"  A difference of {percent:.0f}% overall would have been detected four times in five.")


def _value(name: str, cell: pd.Series, column: str) -> str:
    value = f"{cell[column]:,.1f}".removesuffix(".0") if np.isfinite(cell[column]) else str(cell["status"])
    return f"{name} {value} ({cell['studies_reached']} of {cell['studies']} studies)"


def _only_row(pairs: pd.DataFrame) -> pd.Series | None:
    return None if pairs.empty else pairs.iloc[0]


def _verdict(row: pd.Series | None, options: argparse.Namespace) -> str:
    """A verdict in a sentence, from the point of view of A. row: of `Uncertainty.pairs`; None if there is no pair."""
    if row is None:
        return "no verdict: the two share no workload"
    # Pairs are sorted by name, so the one that was asked for can be the other way round.
    sign = 1.0 if row["a"] == options.a else -1.0
    bounds = sorted([sign * row["low"], sign * row["high"]])
    interval = ""
    if not np.isnan(row["log_ratio"]):
        low, high = np.exp(bounds)
        interval = f" (time ratio {np.exp(sign * row['log_ratio']):.3f}, 95% interval {low:.3f} to {high:.3f})"
    verdict = str(row["verdict"])
    faster = {"a faster": row["a"], "b faster": row["b"]}.get(verdict)
    if faster is not None:
        return f"{options.a} is {'faster' if faster == options.a else 'slower'}{interval}"
    reason = str(row.get("reason") or "")
    return f"{verdict}{': ' + reason if reason else ''}{interval}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
