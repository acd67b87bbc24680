"""What a judge and the evidence cost: judged trials and trials without a judge, alternating.

    python benchmarks/judge.py [--workloads gpt2 resnet vit] [--steps 200] [--rounds 5]

Prints medians: how much the training clock differs, wall seconds of a trial, with the start of its processes, seconds
off the clock (evaluations and logging) for each evaluation, and whether the results are the same to the bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]


def run(folder: Path, workload: str, judge: str, steps: int) -> dict[str, Any]:
    """Run two trials, which go through a worker with and without a judge; the figures of the first in seconds, and its
    losses. wall: of a trial."""
    records = folder / f"{workload}_{judge}"
    command = [
        sys.executable, "run.py", "-m", "seed=0,1", f"workload={workload}", "optimizer=adamw",
        f"workload.max_steps={steps}", f"judge={judge}", "device=cpu", f"records={records}", "machine=here",
        "overwrite=true",
    ]  # fmt: skip
    start = perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall = (perf_counter() - start) / 2
    trial = next(records.rglob("study_0/*/trial_1"))
    with (trial / "eval_measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]
    return {
        "wall": wall,
        "clock": float(last["accumulated_submission_time"]),
        "off": float(last["accumulated_eval_time"]) + float(last["accumulated_logging_time"]),
        "evaluations": len(rows),
        "values": [row["validation/loss"] for row in rows],
        "weights": json.loads((trial / "manifest.json").read_text())["final"]["weights_sha256"],
    }


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["gpt2", "resnet", "vit"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    for workload in options.workloads:
        results: dict[str, list[dict[str, Any]]] = {"none": [], "process": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(options.rounds):
                for judge, trials in results.items():
                    trials.append(run(Path(folder), workload, judge, options.steps))
        pairs = list(zip(results["none"], results["process"], strict=True))
        same = all(a["values"] == b["values"] and a["weights"] == b["weights"] for a, b in pairs)
        ratio = statistics.median(b["clock"] / a["clock"] for a, b in pairs)
        wall = statistics.median(b["wall"] - a["wall"] for a, b in pairs)
        off = statistics.median((b["off"] - a["off"]) / a["evaluations"] for a, b in pairs)
        print(
            f"{workload:<7} clock with / without a judge {ratio:.3f}, wall {wall:+.1f} s a trial, off the clock "
            f"{1000 * off:+.0f} ms an evaluation, {'the same' if same else 'OTHER'} bits"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
