"""What the ledger costs, and how much a second worker speeds up a study.

python benchmarks/ledger.py take [--trials 400] [--workers 1 2 8]     empty trials taken per second
python benchmarks/ledger.py list [--trials 100000]                    listing a folder of finished trials
python benchmarks/ledger.py workers [--steps 300] [--rounds 3]        one study by one worker and by two, alternated
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import pandas as pd
from typing_extensions import override

from harness.config.compose import load_run
from harness.config.schema import Run
from harness.files import write_atomically
from harness.records.lease import Lease
from harness.study import ledger
from harness.study.ledger import PlannedTrial
from harness.study.status import survey_records
from harness.study.worker import Worker

ROOT = Path(__file__).parents[1]
FINISHED = max((ROOT / "results").rglob("manifest.json"), key=lambda path: path.stat().st_size).read_bytes()
"""The manifest of a finished trial, the largest of the committed ones."""


class Empty(Worker):
    """Takes trials as a worker does, and ends each at once."""

    @override
    def _run(self, trial: PlannedTrial, lease: Lease) -> None:
        with (trial.path.records / "taken").open("a") as file:
            file.write(trial.name + "\n")
        write_atomically(trial.path.manifest, FINISHED)


def work(records: Path, begin: multiprocessing.synchronize.Barrier) -> None:
    trials, _ = ledger.list_all_trials(records)
    begin.wait()
    Empty(trials).work()


def study(records: Path, trials: int, *arguments: str) -> Run:
    keys = ["workload=gpt2", "optimizer=adamw", "ruleset=external", "ruleset.studies=1", f"ruleset.trials={trials}"]
    return load_run([*keys, "machine=here", f"records={records}", *arguments])


def take(trials: int, workers: list[int]) -> None:
    context = multiprocessing.get_context("fork")
    for number in workers:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder)
            ledger.plan([study(records, trials)], "unused")
            begin = context.Barrier(number + 1)
            processes = [context.Process(target=work, args=(records, begin)) for _ in range(number)]
            for process in processes:
                process.start()
            begin.wait()
            start = perf_counter()
            for process in processes:
                process.join()
            seconds = perf_counter() - start
            taken = (records / "taken").read_text().splitlines()
            assert len(taken) == len(set(taken)) == trials, "a trial was taken twice, or not at all"
        print(f"{number} workers: {trials / seconds:,.0f} trials per second, each of {trials} taken once")


def listing(trials: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder)
        for trial in ledger.plan([study(records, trials)], "unused"):
            trial.path.folder.mkdir(parents=True)
            trial.path.manifest.write_bytes(FINISHED)
        start = perf_counter()
        surveyed, messages = survey_records(records)
        seconds = perf_counter() - start
        assert len(surveyed) == trials and not messages
    print(
        f"{trials:,} trials with manifests of {len(FINISHED):,} bytes: {seconds:.1f} s, "
        f"{1e6 * seconds / trials:.0f} µs each"
    )


def workers(steps: int, rounds: int) -> None:
    walls: dict[int, list[float]] = {1: [], 2: []}
    clocks: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for number in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                keys = ["ruleset.trials=4", f"workload.max_steps={steps}", f"executor.workers={number}"]
                keys += ["workload=gpt2", "optimizer=adamw", "ruleset=external", "ruleset.studies=1", "machine=here"]
                start = perf_counter()
                command = [sys.executable, str(ROOT / "run.py"), *keys, "run_to_end=true", f"records={folder}"]
                subprocess.run(command, check=True, capture_output=True)
                walls[number].append(perf_counter() - start)
                rows = [pd.read_csv(path).iloc[-1] for path in Path(folder).rglob("eval_measurements.csv")]
                assert len(rows) == 4
                clocks[number].append(statistics.median(row["accumulated_submission_time"] for row in rows))
    wall = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    clock = [two / one for one, two in zip(clocks[1], clocks[2], strict=True)]
    print(f"a study of four trials: two workers are {statistics.median(wall):.2f} times as fast as one "
          f"[{min(wall):.2f} to {max(wall):.2f}]; a trial's clock beside another one's shows "
          f"{statistics.median(clock):.3f} times the seconds [{min(clock):.3f} to {max(clock):.3f}]")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("take")
    taking.add_argument("--trials", type=int, default=400)
    taking.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    listing_ = commands.add_parser("list")
    listing_.add_argument("--trials", type=int, default=100_000)
    comparing = commands.add_parser("workers")
    comparing.add_argument("--steps", type=int, default=300)
    comparing.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.command == "take":
        take(options.trials, options.workers)
    elif options.command == "list":
        listing(options.trials)
    else:
        workers(options.steps, options.rounds)


if __name__ == "__main__":
    main()
