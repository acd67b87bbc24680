"""The cost of the ledger, and the speed-up of a study by a second worker.

python benchmarks/ledger.py take [--trials 400] [--workers 1 2 8]     empty trials claimed per second
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
from harness.records.archive import read_archive
from harness.records.layout import ARCHIVE_SUFFIX, MANIFEST
from harness.records.lease import Lease
from harness.study import ledger
from harness.study.ledger import PlannedTrial
from harness.study.status import survey_records
from harness.study.worker import Worker

ROOT = Path(__file__).parents[1]
FINISHED = max(
    (
        trial.files[MANIFEST]
        for archive in (ROOT / "results").rglob(f"*{ARCHIVE_SUFFIX}")
        for trial in read_archive(archive).trials.values()
    ),
    key=len,
)
"""The manifest of a finished trial, the largest of the committed ones."""


class EmptyWorker(Worker):
    """A worker that claims trials and finishes each at once, without training."""

    @override
    def _run(self, trial: PlannedTrial, lease: Lease) -> None:
        with (trial.path.records / "claimed").open("a") as file:
            file.write(trial.name + "\n")
        write_atomically(trial.path.manifest, FINISHED)


def run_empty_worker(records: Path, barrier: multiprocessing.synchronize.Barrier) -> None:
    """Claim trials until none is left, from the moment that all processes are ready."""
    trials, _ = ledger.list_all_trials(records)
    barrier.wait()
    EmptyWorker(trials).work()


def make_study(records: Path, trials: int, *arguments: str) -> Run:
    """The run of one study of so many trials."""
    keys = ["workload=gpt2", "optimizer=adamw", "ruleset=external", "ruleset.studies=1", f"ruleset.trials={trials}"]
    return load_run([*keys, "machine=here", f"records={records}", *arguments])


def measure_claims(trials: int, worker_counts: list[int]) -> None:
    """Print how many empty trials per second so many workers claim."""
    # fork: the processes have all imports done and are ready at once.
    context = multiprocessing.get_context("fork")
    for number in worker_counts:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder)
            ledger.plan([make_study(records, trials)], "unused")
            barrier = context.Barrier(number + 1)
            processes = [context.Process(target=run_empty_worker, args=(records, barrier)) for _ in range(number)]
            for process in processes:
                process.start()
            barrier.wait()
            start = perf_counter()
            for process in processes:
                process.join()
            seconds = perf_counter() - start
            claimed = (records / "claimed").read_text().splitlines()
            assert len(claimed) == len(set(claimed)) == trials, "a trial was claimed twice, or not at all"
        print(f"{number} workers: {trials / seconds:,.0f} trials per second, each of {trials} claimed once")


def measure_listing(trials: int) -> None:
    """Print how long it takes to list so many finished trials."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder)
        for trial in ledger.plan([make_study(records, trials)], "unused"):
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


def measure_second_worker(steps: int, rounds: int) -> None:
    """Print how much faster two workers finish a study, and how much slower each trial's clock runs."""
    walls: dict[int, list[float]] = {1: [], 2: []}
    clocks: dict[int, list[float]] = {1: [], 2: []}
    # Alternated, so that a drift of the machine's speed affects both.
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
    speedup = [single / double for single, double in zip(walls[1], walls[2], strict=True)]
    slowdown = [double / single for single, double in zip(clocks[1], clocks[2], strict=True)]
    print(
        f"a study of four trials: two workers are {statistics.median(speedup):.2f} times as fast as one "
        f"[{min(speedup):.2f} to {max(speedup):.2f}]; with a second trial running, a trial's clock shows "
        f"{statistics.median(slowdown):.3f} times the seconds [{min(slowdown):.3f} to {max(slowdown):.3f}]"
    )


def main() -> None:
    """Parse the command line and run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("take")
    take.add_argument("--trials", type=int, default=400)
    take.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    list_ = commands.add_parser("list")
    list_.add_argument("--trials", type=int, default=100_000)
    workers = commands.add_parser("workers")
    workers.add_argument("--steps", type=int, default=300)
    workers.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.command == "take":
        measure_claims(options.trials, options.workers)
    elif options.command == "list":
        measure_listing(options.trials)
    else:
        measure_second_worker(options.steps, options.rounds)


if __name__ == "__main__":
    main()
