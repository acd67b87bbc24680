"""From the command to the first training step, against the imports alone, alternated.

    python benchmarks/startup.py [--workload gpt2] [--rounds 5]

The command trains and evaluates one step; what its record says about that step and its evaluation is subtracted.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    imports, commands = [], []
    for _ in range(options.rounds):
        imports.append(_seconds([sys.executable, "-c", IMPORTS]))
        with tempfile.TemporaryDirectory() as folder:
            keys = [f"workload={options.workload}", "workload.max_steps=1", "workload.eval_every=1"]
            whole = _seconds([sys.executable, str(ROOT / "run.py"), *keys, "optimizer=adamw", f"records={folder}"])
            (manifest,) = Path(folder).rglob("manifest.json")
            assert json.loads(manifest.read_text())["status"] == "exhausted"
            row = pd.read_csv(manifest.parent / "eval_measurements.csv").iloc[-1]
        commands.append(whole - row["accumulated_submission_time"] - row["accumulated_eval_time"])
    a, b = statistics.median(imports), statistics.median(commands)
    print(f"imports alone {a:.2f} s, command to first step (and exit) {b:.2f} s, ratio {b / a:.2f}")


def _seconds(command: list[str]) -> float:
    start = perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return perf_counter() - start


if __name__ == "__main__":
    main()
