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

from harness import reading, targets
from harness.problems import UserError, reporting
from harness.pruning import Futility
from harness.replay import Replay, replay

HEADS = f"{'policy':<9}{'margin':>7}{'at once':>8}{'seconds':>9}{'steps':>8}{'stopped':>13}{'max error':>11}"
HEADS += f"{'by steps':>10}{'ranks':>7}{'flipped':>9}{'lost':>6}{'changed':>9}"


def main() -> int:
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
    options = parser.parse_args()
    if options.half and (options.stop or options.look_at):
        raise UserError("--half: chooses --stop and --look-at by itself; give one or the other")
    if min(options.parallel) < 1 or min(options.margins) <= 0:
        raise UserError("--parallel must be at least 1, --margins above 0")
    wanted = targets.read(options.targets) if options.targets else None
    # AlgoPerf keeps trials whose clock runs backwards, and so do its scores.
    records = reading.read(
        options.records, wanted, scale=options.scale, ruleset=options.ruleset, trust_clock=wanted is not None
    )
    stop, look_at = options.stop, options.look_at
    if options.half:
        names = sorted(records.trials["submission"].unique())
        stop = names[options.half - 1 :: 2]
        look_at = stop if options.half == 1 else None
    print(f"stopped are trials of {', '.join(stop) if stop else 'all submissions'}")
    print(HEADS)
    for policy in options.policies:
        for margin in options.margins if policy == "futility" else [None]:
            for parallel in options.parallel:
                rule = Futility(margin=margin) if margin else None
                done = replay(records, policy, parallel=parallel, rule=rule, stop=stop, look_at=look_at)
                shown = "" if margin is None else f"{margin:g}"
                print(f"{policy:<9}{shown:>7}{parallel:>8}{_line(done)}", flush=True)
                if options.cells:
                    _changes(done)
    print(
        "seconds, steps: share of the compute that is left. max error: of a benchmark score, by steps: of a score by "
        "steps.\nflipped: cells (submission, workload) reached before and no longer; lost: those that gave a score; "
        "changed: whose time\nmoved, those included."
    )
    return 0


def _line(done: Replay) -> str:
    return (
        f"{done.seconds_share:>9.1%}{done.steps_share:>8.1%}{f'{done.stopped} of {done.trials}':>13}{done.error:>11.4f}"
        f"{done.steps_error:>10.4f}{done.ranks_changed:>7}{done.flipped:>9}{done.lost:>6}{len(done.cells):>9}"
    )


def _changes(done: Replay) -> None:
    for name, now in done.scores.to_dict("index").items():
        if abs(now["score"] - now["score_before"]) > 5e-5 or now["rank"] != now["rank_before"]:
            score = f"{now['score_before']:.4f} -> {now['score']:.4f}"
            print(f"    {name!s:.60}: score {score}, rank {now['rank_before']} -> {now['rank']}")
    for cell in done.cells.to_dict("records"):
        time = f"{cell['seconds_before']:.1f} -> {cell['seconds']:.1f} s"
        mark = "" if cell["counted"] else " (did not count)"
        print(f"    {cell['submission']!s:.60} on {cell['workload']!s:.60}: {time}{mark}")


if __name__ == "__main__":
    sys.exit(reporting(main))
