"""Time from the command to the first training step, against the time of the imports alone, alternated.

    python benchmarks/startup.py [--workload gpt2] [--rounds 5]

The command trains and evaluates one step; the recorded times of the step and the evaluation are subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import pandas as pd

ROOT = Path(__file__).parent.parent
IMPORTS = "import torch, torch.optim, hydra, omegaconf, pydantic, rich.progress, numpy"


def main() -> None:
    """Parse the command line, measure and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    imports, commands = [], []
    # Alternated, so that a drift of the machine's speed affects both.
    for _ in range(options.rounds):
        imports.append(_time_command([sys.executable, "-c", IMPORTS]))
        with tempfile.TemporaryDirectory() as folder:
            keys = [f"workload={options.workload}", "workload.max_steps=1", "workload.eval_every=1"]
            command = [sys.executable, str(ROOT / "run.py"), *keys, "optimizer=adamw", f"records={folder}"]
            total = _time_command(command)
            (manifest,) = Path(folder).rglob("manifest.json")
            assert json.loads(manifest.read_text())["status"] == "exhausted"
            row = pd.read_csv(manifest.parent / "eval_measurements.csv").iloc[-1]
        commands.append(total - row["accumulated_submission_time"] - row["accumulated_eval_time"])
    baseline, startup = statistics.median(imports), statistics.median(commands)
    print(
        f"imports alone {baseline:.2f} s, command to first step (and exit) {startup:.2f} s, "
        f"ratio {startup / baseline:.2f}"
    )


def _time_command(command: list[str]) -> float:
    """Seconds of a command, which must succeed."""
    start = perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return perf_counter() - start


if __name__ == "__main__":
    main()
