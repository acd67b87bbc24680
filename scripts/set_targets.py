"""Measure the target of a workload, and whether the workload is quiet enough to be an instrument.

    python scripts/set_targets.py gpt2 resnet vit [--workers 2] [--write]

1. grid      sgd, adamw and nadamw at a few points, one seed, run and schedule over 0.75 of the budget
2. finalist  the best of them on five other seeds; the target is the median of their final values
3. confirm   the baseline, adamw at the best of its points, full budget, ten further seeds: at least nine must
             meet the target, and for the workload to be accepted as an instrument all must, with a coefficient of
             variation of their steps-to-target of at most 5%

A resumable job: finished trials are found in --records and not run again. Its seeds serve no study. With --write the
target and its provenance go into the workload's config, where nothing else changes.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from harness.config import CONFIG_DIR, load
from harness.workload import Facts

ROOT = Path(__file__).parent.parent
LENGTH = 0.75
# Hyperparameters that a point does not name are the recipe's.
GRID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sgd", {"lr": 0.3}),
    ("sgd", {"lr": 1.0}),
    ("adamw", {"lr": 4e-3, "weight_decay": 0.05, "betas": [0.9, 0.98]}),
    ("adamw", {"lr": 8e-3, "weight_decay": 0.05, "betas": [0.9, 0.98]}),
    ("adamw", {"lr": 1.6e-2, "weight_decay": 0.05, "betas": [0.9, 0.98]}),
    ("adamw", {"lr": 1.6e-2, "weight_decay": 0.1, "betas": [0.9, 0.98]}),
    ("adamw", {"lr": 1.2e-2, "weight_decay": 0.1, "betas": [0.8, 0.999]}),
    ("nadamw", {"lr": 6e-3}),
    ("nadamw", {"lr": 1.2e-2}),
)
# Seeds 900000 to 900019 served the targets of version 1.
GRID_SEED = 900_100
FINALIST_SEEDS = range(900_101, 900_106)
CONFIRM_SEEDS = range(900_110, 900_120)
HITS_NEEDED, LARGEST_VARIATION = 9, 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "targets")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put target and provenance into the config")
    options = parser.parse_args()
    accepted = [_measure(workload, options) for workload in options.workloads]
    return 0 if all(accepted) else 1


def _measure(workload: str, options: argparse.Namespace) -> bool:
    base = [f"workload={workload}", f"scale={options.scale}", "run_to_end=true", f"records={options.records}"]
    facts = load([*base, "optimizer=adamw"]).facts
    short = [*base, f"workload.max_steps={round(LENGTH * facts.max_steps)}", "schedule.horizon_fraction=1.0"]
    metric = f"validation/{facts.metric}"
    best = min if facts.direction == "min" else max

    grid = _curves([[*short, *_point(p), f"seed={GRID_SEED}"] for p in GRID], options.workers)
    finals = [_final(curve, metric) for curve in grid]
    for point, value in zip(GRID, finals, strict=True):
        print(f"{workload} grid      {_name(point):60} {value:.4f}", flush=True)
    usable = [i for i, value in enumerate(finals) if value == value]
    winner = GRID[best(usable, key=lambda i: finals[i])]

    reruns = _curves([[*short, *_point(winner), f"seed={seed}"] for seed in FINALIST_SEEDS], options.workers)
    values = [_final(curve, metric) for curve in reruns]
    target = round(statistics.median(values), 4)
    listed = " ".join(f"{value:.4f}" for value in values)
    print(f"{workload} finalist  {_name(winner)}: {listed} -> target {target}", flush=True)

    baseline = GRID[best((i for i in usable if GRID[i][0] == "adamw"), key=lambda i: finals[i])]
    confirm = _curves([[*base, *_point(baseline), f"seed={seed}"] for seed in CONFIRM_SEEDS], options.workers)
    steps = [_steps_to(curve, metric, facts, target) for curve in confirm]
    hits = [step for step in steps if step is not None]
    variation = statistics.stdev(hits) / statistics.mean(hits) if len(hits) > 1 else float("nan")
    both = zip(confirm, steps, strict=True)
    reached = statistics.median(curve["global_step"].le(step).sum() for curve, step in both if step)
    share = statistics.median(
        c["accumulated_eval_time"].iloc[-1] / c["total_duration"].iloc[-1] for c in confirm
    )  # fmt: skip
    quiet = len(hits) == len(steps) and variation <= LARGEST_VARIATION
    print(f"{workload} confirm   steps-to-target {steps}")
    mean = statistics.mean(hits or [float("nan")])
    print(
        f"{workload} confirm   {len(hits)}/{len(steps)} hits, mean {mean:.0f} steps, "
        f"CV {100 * variation:.1f}%, {reached:g} evaluations up to the target, "
        f"evaluation {100 * share:.0f}% of the wall time: {'accepted' if quiet else 'REJECTED'}",
        flush=True,
    )
    if quiet and len(hits) >= HITS_NEEDED and options.write:
        provenance = {
            "command": f"python scripts/set_targets.py {workload} --scale {options.scale}",
            "grid": {_name(point): round(value, 4) for point, value in zip(GRID, finals, strict=True)},
            "grid_seed": GRID_SEED,
            "winner": _name(winner),
            "finals": {seed: round(v, 4) for seed, v in zip(FINALIST_SEEDS, values, strict=True)},
            "baseline": f"{_name(baseline)}, full budget",
            "steps_to_target": dict(zip(CONFIRM_SEEDS, steps, strict=True)),
            "hits": f"{len(hits)}/{len(steps)}",
            "coefficient_of_variation": round(float(variation), 4),
            "evaluations_to_target": float(reached),
            "evaluation_share_of_wall_time": round(float(share), 2),
        }
        _write(workload, options.scale, target, provenance)
    return quiet


def _point(point: tuple[str, dict[str, Any]]) -> list[str]:
    name, values = point
    return [f"optimizer={name}", *(f"optimizer.hyperparameters.{key}={value}" for key, value in values.items())]


def _name(point: tuple[str, dict[str, Any]]) -> str:
    name, values = point
    return f"{name} " + ", ".join(f"{key} {value}" for key, value in values.items())


def _curves(runs: list[list[str]], workers: int) -> list[pd.DataFrame]:
    """Run what is not finished, `workers` processes at a time; the curves in the order of `runs`."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_curve, runs))


def _curve(arguments: list[str]) -> pd.DataFrame:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "1000"})
    found = re.search(r"^record\s+(.+?)\s*$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or not found:
        raise SystemExit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return pd.read_csv(Path(found.group(1)) / "eval_measurements.csv")


def _final(curve: pd.DataFrame, metric: str) -> float:
    return float(curve[metric].iloc[-1])


def _steps_to(curve: pd.DataFrame, metric: str, facts: Facts, target: float) -> int | None:
    met = curve[metric] <= target if facts.direction == "min" else curve[metric] >= target
    return int(curve["global_step"][met].iloc[0]) if met.any() else None


def _write(workload: str, scale: str, target: float, provenance: dict[str, object]) -> None:
    path = CONFIG_DIR / "workload" / "scale" / f"{workload}-{scale}.yaml"
    text = path.read_text().split("target_provenance:")[0].rstrip() + "\n"
    text = re.sub(r"^target: .*$", f"target: {target}", text, flags=re.MULTILINE)
    path.write_text(text + OmegaConf.to_yaml({"target_provenance": provenance}))
    print(f"{workload} written   {path}")


if __name__ == "__main__":
    sys.exit(main())
