"""Replay recorded trials through a stopping policy: compute saved against what changes in the scores.

    python scripts/replay.py RECORDS... [--targets FILE] [--policies exact futility] [--margins 1.2] [--parallel 1 5]
        [--stop NAME...] [--look-at NAME...] [--half 1|2] [--cells]

RECORDS are folders in AlgoPerf's layout (AlgoPerf's own, with --targets, or ours). A line for every policy, margin of
the futility rule (smaller is stricter) and number of trials of a study at a time. --stop: the submissions whose trials
may be stopped; --look-at: those whose trials the futility rule may compare with. --half 1 takes every second
submission in alphabetical order, from the first, for both; --half 2 stops the others and looks at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.command_line import run_script
from harness.errors import UserError
from harness.scoring.load_records import load_records
from harness.scoring.targets import read_targets
from harness.study.pruning_replay import Replay, replay
from harness.study.pruning_rules import Futility

HEADINGS = f"{'policy':<9}{'margin':>7}{'at once':>8}{'seconds':>9}{'steps':>8}{'stopped':>13}{'max error':>11}"
HEADINGS += f"{'by steps':>10}{'ranks':>7}{'flipped':>9}{'lost':>6}{'changed':>9}"


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--targets", type=Path, help="AlgoPerf's targets JSON; default: what the manifests declare")
    parser.add_argument("--ruleset")
    parser.add_argument("--scale")
    parser.add_argument("--policies", nargs="+", choices=["exact", "futility"], default=["exact", "futility"])
    parser.add_argument("--margins", nargs="+", type=float, default=[Futility.margin])
    parser.add_argument("--parallel", nargs="+", type=int, default=[1])
    parser.add_argument("--stop", nargs="+", metavar="NAME")
    parser.add_argument("--look-at", nargs="+", metavar="NAME")
    parser.add_argument("--half", type=int, choices=[1, 2])
    parser.add_argument("--cells", action="store_true", help="list every score, rank and cell that changed")
    options = parser.parse_args(arguments)
    if options.half and (options.stop or options.look_at):
        raise UserError("--half: chooses --stop and --look-at by itself; give one or the other")
    if min(options.parallel) < 1 or min(options.margins) <= 0:
        raise UserError("--parallel must be at least 1, --margins above 0")
    targets = read_targets(options.targets) if options.targets else None
    # AlgoPerf's scores count trials whose clock runs backwards.
    records = load_records(
        options.records, targets, scale=options.scale, ruleset=options.ruleset, trust_clock=targets is not None
    )
    stop, look_at = options.stop, options.look_at
    if options.half:
        names = sorted(records.trials["submission"].unique())
        stop = names[options.half - 1 :: 2]
        # The first half chooses the margin and must not see the second, which then tests it (docs/pruning.md).
        look_at = stop if options.half == 1 else None
    print(f"stopped are trials of {', '.join(stop) if stop else 'all submissions'}")
    print(HEADINGS)
    for policy in options.policies:
        for margin in options.margins if policy == "futility" else [None]:
            for parallel in options.parallel:
                rule = Futility(margin=margin) if margin else None
                result = replay(records, policy, parallel=parallel, rule=rule, stop=stop, look_at=look_at)
                shown = "" if margin is None else f"{margin:g}"
                print(f"{policy:<9}{shown:>7}{parallel:>8}{_line(result)}", flush=True)
                if options.cells:
                    _print_changes(result)
    print(
        "seconds, steps: share of the compute that is left. max error: of a benchmark score, by steps: of a score by "
        "steps.\nflipped: cells (submission, workload) reached before and no longer; lost: those that gave a score; "
        "changed: whose time\nmoved, those included."
    )
    return 0


def _line(result: Replay) -> str:
    return (
        f"{result.seconds_share:>9.1%}{result.steps_share:>8.1%}{f'{result.stopped} of {result.trials}':>13}"
        f"{result.error:>11.4f}{result.steps_error:>10.4f}{result.ranks_changed:>7}{result.flipped:>9}{result.lost:>6}{len(result.cells):>9}"
    )


def _print_changes(result: Replay) -> None:
    for name, now in result.scores.to_dict("index").items():
        # Half of the last digit shown.
        if abs(now["score"] - now["score_before"]) > 5e-5 or now["rank"] != now["rank_before"]:
            score = f"{now['score_before']:.4f} -> {now['score']:.4f}"
            print(f"    {name!s:.60}: score {score}, rank {now['rank_before']} -> {now['rank']}")
    for cell in result.cells.to_dict("records"):
        time = f"{cell['seconds_before']:.1f} -> {cell['seconds']:.1f} s"
        mark = "" if cell["counted"] else " (did not count)"
        print(f"    {cell['submission']!s:.60} on {cell['workload']!s:.60}: {time}{mark}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
