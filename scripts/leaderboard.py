"""Make a leaderboard from records.

    python scripts/leaderboard.py RECORDS... --out DIR [--targets FILE] [--mode default|algoperf] [--baseline NAME]
        [--ruleset external|self_tuning|quick] [--scale mini] [--workloads NAME...] [--submissions NAME...]
        [--timing FILE...] [--mix-machines] [--mix precision...] [--title TEXT] [--check]

RECORDS are folders in AlgoPerf's layout (AlgoPerf's own, with --targets, or ours), or one table that --consolidate
wrote. Writes scores.csv, times.csv, LEADERBOARD.md, leaderboard.tex and site/index.html into --out. --check writes
nothing and ends with status 1 if what stands in --out differs from what the records give.

Records are held against the configs and against one another (scripts/audit.py lists what is found). Targets are those
of the configs, or of --targets.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from harness.board.files import compare_board, write_board
from harness.command_line import run_script
from harness.errors import UserError
from harness.review.settings import MIXABLE
from harness.scoring.leaderboard import score
from harness.scoring.load_records import Records, load_records
from harness.scoring.targets import read_targets
from harness.scoring.timings import read_timings
from harness.scoring.trials_table import read_trials_table, write_trials_table


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    records = _load(options)
    if options.consolidate:
        write_trials_table(records, options.consolidate)
    timings = [read_timings(path) for path in options.timing]
    board = score(
        records,
        mode=options.mode,
        baseline=options.baseline,
        timings=timings[0] if timings else None,
        further_timings=timings[1:],
        mix_machines=options.mix_machines,
        ruleset=options.ruleset,
    )
    # The board names the command that made it; a check is the same command with --check.
    words = [word for word in arguments if word != "--check"]
    commands = [shlex.join(["python", "scripts/leaderboard.py", *words])]
    if options.check:
        differing = compare_board(board, options.out, options.title, commands)
        for line in differing:
            print(line)
        print(f"{options.out}: {'differs from' if differing else 'is'} what the records give")
        return 1 if differing else 0
    write_board(board, options.out, options.title, commands)
    print("\n".join(board.notes))
    for row in board.scores.itertuples():
        print(f"{row.score:.4f}  {row.submission!s:.60}")
    print(f"written: {options.out / 'LEADERBOARD.md'}, {options.out / 'site' / 'index.html'}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=Path, help="AlgoPerf's targets JSON; default: the configs")
    parser.add_argument("--mode", choices=["default", "algoperf"], default="default")
    parser.add_argument("--baseline", help="the speed-up is over this submission (default: adamw or baseline)")
    parser.add_argument("--ruleset", choices=["external", "self_tuning", "quick"])
    parser.add_argument("--scale")
    parser.add_argument("--workloads", nargs="+", help="a table of these alone; default: all that have records")
    parser.add_argument("--submissions", nargs="+", help="a table of these alone, of those that were timed for example")
    parser.add_argument("--timing", type=Path, nargs="+", default=[],
                        help="seconds from this file of scripts/timing.py; of further ones, a column each")  # fmt: skip
    parser.add_argument("--mix-machines", action="store_true", help="compare clocks of different machines all the same")
    parser.add_argument("--mix", choices=MIXABLE, nargs="+", default=[],
                        help="compare records that differ in these all the same")  # fmt: skip
    parser.add_argument("--title", default="Leaderboard")
    parser.add_argument("--check", action="store_true", help="compare with --out instead of writing")
    parser.add_argument("--consolidate", type=Path, help="also write the trials as one table to this file")
    return parser.parse_args(arguments)


def _load(options: argparse.Namespace) -> Records:
    """The records that the options name, restricted as they say."""
    targets = read_targets(options.targets) if options.targets else None
    if options.records[0].suffix == ".csv":
        if len(options.records) > 1:
            raise UserError("one table of trials at a time")
        records = read_trials_table(options.records[0], targets)
    else:
        # AlgoPerf keeps trials whose clock runs backwards.
        trust_clock = options.mode == "algoperf"
        records = load_records(
            options.records,
            targets,
            scale=options.scale,
            ruleset=options.ruleset,
            workloads=options.workloads,
            submissions=options.submissions,
            trust_clock=trust_clock,
            accepted=options.mix,
        )
    if options.workloads:
        records = records.select_workloads(options.workloads)
    if options.submissions:
        records = records.select_submissions(options.submissions)
    return records


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
