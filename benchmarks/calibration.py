"""How often verdicts are right on real seeds: equals called different, and slowdowns seen.

    python benchmarks/calibration.py [--studies 3 5 6 10] [--slowdowns 1.03 1.05] [--draws 1000] [--same-seeds]
    python benchmarks/calibration.py --coarser 2

The thirty trials of AdamW that confirmed the targets (results/targets) are the seeds. A draw takes two disjoint sets of
them for each workload, as the studies of two submissions, and asks `uncertainty.estimate`, as a board does. Equals are
two such sets; a slowdown multiplies the times of the second, and the spacing of its evaluations, which is what a step
that costs more does. With --same-seeds a study has the same seed on all workloads.

Times are the interpolated crossings; --recorded takes the evaluations that met the target, as mode algoperf does.
--coarser N prints instead how far crossings move, as a share of the wider spacing, where only every N-th evaluation is
left: the error of the interpolation that all studies share (docs/statistics.md, eq. 9a).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.command_line import run_script
from harness.config.compose import load_run
from harness.errors import UserError
from harness.interface.workload import WorkloadSpec
from harness.records.archive import read_archive
from harness.records.evaluations import Evaluations, parse_evaluations
from harness.records.layout import EVALUATIONS
from harness.scoring.crossings import Crossings, find_crossings
from harness.scoring.uncertainty import estimate
from harness.study.target_procedure import CONFIRM_RUNS, CONFIRM_SEED

ROOT = Path(__file__).parents[1]
WORKLOADS = ("gpt2", "resnet", "vit")
CONFIRM_SEEDS = range(CONFIRM_SEED, CONFIRM_SEED + CONFIRM_RUNS)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class RealSeeds:
    """The confirmation trials of all workloads: arrays float [workloads, seeds], in nominal steps."""

    crossing: Array
    """Interpolated."""
    recorded: Array
    """Of the evaluation that met the target."""
    spacing: Array
    """Since the evaluation before it."""


def read_real_seeds(records: Path) -> RealSeeds:
    """The confirmation trials below `records`; raises UserError where one is missing or missed its target."""
    columns = [_read_workload(name, records) for name in WORKLOADS]
    return RealSeeds(*(np.stack(column) for column in zip(*columns, strict=True)))


def _read_workload(name: str, records: Path) -> tuple[Array, Array, Array]:
    """Crossing, recorded steps and spacing of the seeds of one workload: each [seeds]."""
    rows, spec = _read_rows(name, records)
    crossings = _find(rows, spec)
    if np.isnan(crossings.crossing_share).any():
        raise UserError(f"a confirmation trial of {name} does not meet the target of its configuration")
    return _crossing(crossings), crossings.steps, crossings.resolution_steps


def _find(rows: Evaluations, spec: WorkloadSpec) -> Crossings:
    is_min = np.full(CONFIRM_RUNS, spec.direction == "min", dtype=bool)
    return find_crossings(rows, np.full(CONFIRM_RUNS, spec.target), is_min)


def _crossing(crossings: Crossings) -> Array:
    """In nominal steps: [seeds] (docs/statistics.md, eq. 8b)."""
    return crossings.steps - (1 - crossings.crossing_share) * crossings.resolution_steps


def _read_rows(name: str, records: Path) -> tuple[Evaluations, WorkloadSpec]:
    """Every evaluation of the confirmation trials of a workload, numbered by their seeds from 0."""
    spec = load_run([f"workload={name}", "scale=mini", "optimizer=adamw"]).spec
    contents = _read_files(records).get(name, {})
    if sorted(contents) != list(range(CONFIRM_RUNS)):
        raise UserError(f"{records} has {len(contents)} of the {CONFIRM_RUNS} confirmation trials of {name}")
    return parse_evaluations(contents, dict.fromkeys(contents, f"validation/{spec.metric}")).rows, spec


@functools.cache
def _read_files(records: Path) -> dict[str, dict[int, bytes]]:
    """By workload and seed, counted from 0: the evaluations of every confirmation trial."""
    files: dict[str, dict[int, bytes]] = defaultdict(dict)
    for archive in sorted(records.glob("*/external/*/adamw-*.tar.xz")):
        for trial in read_archive(archive).trials.values():
            if trial.study in CONFIRM_SEEDS:
                files[trial.workload][trial.study - CONFIRM_SEED] = trial.files[EVALUATIONS]
    return files


def measure_shifts(records: Path, every: int) -> dict[str, tuple[float, float]]:
    """By workload: mean and standard deviation, over seeds and over where counting starts, of the shift of the
    crossing in units of the wider spacing, where every `every`-th evaluation is left."""
    shifts = {}
    for name in WORKLOADS:
        rows, spec = _read_rows(name, records)
        fine = _find(rows, spec)
        position = np.arange(len(rows.trial)) - np.searchsorted(rows.trial, rows.trial)
        moved = []
        for start in range(every):
            kept = position % every == start
            further = {key: column[kept] for key, column in rows.further.items()}
            thinned = Evaluations(rows.trial[kept], rows.seconds[kept], rows.steps[kept], rows.value[kept], further)
            moved.append((_crossing(_find(thinned, spec)) - _crossing(fine)) / (every * fine.resolution_steps))
        shifts[name] = float(np.nanmean(moved)), float(np.nanstd(moved))
    return shifts


@dataclass(frozen=True)
class Rates:
    """Over the draws of one number of studies and one slowdown."""

    called_different: float
    """Share of draws with a verdict."""
    called_wrong_way: float
    """Share of draws in which the slower one was called faster."""
    width: float
    """Median of high / low of the interval of the ratio, less 1."""


def measure_rates(
    seeds: RealSeeds,
    studies: int,
    slowdown: float,
    draws: int,
    *,
    same_seeds: bool = False,
    recorded: bool = False,
) -> Rates:
    """The rates over `draws` pairs of disjoint sets of `studies` seeds; the second's times are `slowdown` as long."""
    rng = np.random.default_rng([studies, draws])
    verdicts, widths = [], []
    times = seeds.recorded if recorded else seeds.crossing
    for _ in range(draws):
        taken = [rng.permutation(times.shape[1])[: 2 * studies] for _ in WORKLOADS]
        if same_seeds:
            taken = [taken[0]] * len(WORKLOADS)
        position = np.stack(taken).reshape(len(WORKLOADS), 2, studies)
        factor = np.array([1.0, slowdown])[None, :, None]
        row = np.arange(len(WORKLOADS))[:, None, None]
        table = _studies_table(times[row, position] * factor, seeds.spacing[row, position] * factor, not recorded)
        pair = estimate(table, baseline=None, draws=2).pairs.iloc[0]
        verdicts.append(pair["verdict"])
        widths.append(np.exp(pair["high"] - pair["low"]) - 1)
    verdict = np.array(verdicts)
    is_wrong = verdict == "b faster"
    return Rates(float(np.mean(is_wrong | (verdict == "a faster"))), float(is_wrong.mean()), float(np.median(widths)))


def _studies_table(times: Array, spacing: Array, interpolated: bool) -> pd.DataFrame:
    """times, spacing: [workloads, submissions, studies], as the rows that `estimate` reads."""
    workload, submission, study = (index.ravel() for index in np.indices(times.shape))
    return pd.DataFrame(
        {
            "submission": np.array(["a", "b"])[submission],
            "workload": np.array(WORKLOADS)[workload],
            "study": study,
            "time": times.ravel(),
            "limit": times.ravel(),
            "resolution": spacing.ravel(),
            "interpolated": interpolated,
        }
    )


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "targets")
    parser.add_argument("--studies", type=int, nargs="+", default=[3, 5, 6, 8, 10])
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[1.03, 1.05])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--same-seeds", action="store_true", help="a study has the same seed on all workloads")
    parser.add_argument("--coarser", type=int, metavar="N", help="print how crossings move with every N-th evaluation")
    parser.add_argument("--recorded", action="store_true", help="times of the evaluations that met the target")
    options = parser.parse_args(arguments)
    if most := [number for number in options.studies if not 2 <= number <= CONFIRM_RUNS // 2]:
        raise UserError(f"--studies {most[0]}: two disjoint sets of {CONFIRM_RUNS} seeds have 2 to {CONFIRM_RUNS // 2}")
    if options.coarser:
        for name, (mean, sd) in measure_shifts(options.records, options.coarser).items():
            print(f"{name:8} crossing moves by {mean:5.2f} of the spacing, standard deviation {sd:.2f}")
        return 0
    seeds = read_real_seeds(options.records)
    slower = "".join(f"  {100 * (slowdown - 1):.0f}% slower" for slowdown in options.slowdowns)
    print(f"studies  equals{slower}  width of the interval")
    for studies in options.studies:
        each = [
            measure_rates(
                seeds, studies, factor, options.draws, same_seeds=options.same_seeds, recorded=options.recorded
            )
            for factor in (1.0, *options.slowdowns)
        ]
        seen = "".join(f"  {100 * (rates.called_different - rates.called_wrong_way):8.1f}%" for rates in each[1:])
        print(f"{studies:7}  {100 * each[0].called_different:5.1f}%{seen}  {100 * each[0].width:.1f}%")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
