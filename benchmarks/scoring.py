"""Time and memory of scoring, from files on disk to scores.

    python benchmarks/scoring.py --algoperf FOLDER --targets FILE       AlgoPerf's v0.5 external records, unpacked
    python benchmarks/scoring.py --synthetic 10000 100000 1000000       tables of so many trials

Each measurement runs in a new process. Prints the wall-clock seconds of reading and scoring, and of the complete
process with its imports, and the peak memory. AlgoPerf's own scorer needs 13.3 s and 205 MiB for its records on a
machine with two cores.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd

from harness.scoring.benchmark_score import benchmark_scores, qualified, study_times, times_to_target
from harness.scoring.load_records import Records, load_records
from harness.scoring.targets import Target, Targets, read_targets
from harness.scoring.trials_table import read_trials_table

WORKLOADS = [f"w{i}" for i in range(20)]
SYNTHETIC = Targets(tuple(WORKLOADS), (), {name: Target("loss", "min", 1.0) for name in WORKLOADS})


def main() -> None:
    """Parse the command line and run the measurements, each in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algoperf", type=Path)
    parser.add_argument("--targets", type=Path)
    parser.add_argument("--synthetic", type=int, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        _measure(options.single, options.targets)
        return
    if options.algoperf:
        for _ in range(options.rounds):
            _measure_in_process("AlgoPerf v0.5 external", options.algoperf, ["--targets", str(options.targets)])
    with tempfile.TemporaryDirectory() as folder:
        for trials in options.synthetic:
            path = Path(folder) / "trials.csv"
            _synthetic_trials(trials).to_csv(path, index=False)
            _measure_in_process(f"{trials:,} trials", path, [])


def _measure_in_process(name: str, path: Path, arguments: list[str]) -> None:
    start = perf_counter()
    command = [sys.executable, __file__, "--single", str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{name:24} {result.stdout.strip()}, complete process {perf_counter() - start:.2f} s", flush=True)


def _measure(path: Path, targets: Path | None) -> None:
    start = perf_counter()
    records: Records
    if targets is not None:
        records = load_records([path], read_targets(targets), trust_clock=True)
    else:
        records = read_trials_table(path, SYNTHETIC)
    read = perf_counter() - start
    for column in ("seconds", "steps"):
        times = times_to_target(study_times(records.trials, column), column)
        scores = benchmark_scores(qualified(times, records.targets).to_numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = perf_counter() - start
    print(f"{len(scores)} scores: reading {read:.2f} s, with scoring {total:.2f} s, peak memory {peak:.0f} MiB", end="")


def _synthetic_trials(trials: int) -> pd.DataFrame:
    """A table of submissions x 20 workloads x 5 studies x 5 trials; a third of them miss the target."""
    rng = np.random.default_rng(0)
    number = np.arange(trials)
    reached = rng.random(trials) > 1 / 3
    steps = rng.integers(1, 100, trials)
    return pd.DataFrame(
        {
            "submission": np.char.add("s", (number // 500).astype(str)),
            "workload": np.array(WORKLOADS)[number // 25 % 20],
            "status": np.where(reached, "reached", "exhausted"),
            "study": number // 5 % 5,
            "trial": number % 5 + 1,
            "index": np.where(reached, steps, np.nan),
            "seconds": np.where(reached, steps * rng.lognormal(0, 0.3, trials), np.nan),
            "steps": np.where(reached, steps * 100.0, np.nan),
        }
    )


if __name__ == "__main__":
    main()
