"""The overhead of the harness: training segments, as the clock runs around them, against a loop written by hand.

    python benchmarks/overhead.py [WORKLOAD ...] [--steps 60] [--rounds 15] [--clock wall | cpu] [KEY=VALUE ...]

The loop (benchmarks/bare_loop.py) shares no code with the harness or the workloads but the model: it gathers, crops and
mirrors its batches, clips, schedules and updates itself. Both train on random data of the real shapes, on the same
device, with torch's fused AdamW, and alternate in one process. Prints the median ratio, its range, and seconds per step
of both. On a shared machine use `--clock cpu`, which measures processor time. Goal: a median of at most 1.01.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from time import perf_counter, process_time

import torch
from comparison import MINI, Options, alternate, bare_loop_for, make_training

from harness.command_line import run_script
from harness.errors import UserError


def main(arguments: list[str]) -> int:
    """Measure the workloads, print the ratios and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORKLOAD or KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args(arguments)
    settings = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word]
    for name in names:
        if name not in MINI:
            raise UserError(f"{name}: no such workload; there are {', '.join(MINI)}")
    clock = process_time if options.clock == "cpu" else perf_counter
    for name in names or MINI:
        training = make_training(Options("auto", tiny=False), f"workload={name}", "optimizer=adamw", *settings)
        run = training.run
        bare = bare_loop_for(training, run.precision, run.compile)
        figures = alternate(training, bare, options.steps, options.rounds, clock)
        ratios = figures["ratios"]
        card = torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else "CPU"
        print(
            f"{name:7} harness / bare loop: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to "
            f"{max(ratios):.3f}; {1e3 * figures['seconds per step']:.2f} and {1e3 * figures['bare loop']:.2f} ms per "
            f"step, {options.clock} clock, {card}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
