"""Seconds that can be compared: a timing run in which all submissions alternate on one machine.

Steps-to-target hardly depend on the machine; seconds per step do, and on shared machines they wander by a factor of
two. So a board's time-to-target is

    steps-to-target x median seconds per step + building the submission + compiling its own code

with all three from a timing run. Within a round every submission trains one short segment, in random order, so that
whatever slows the machine slows all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from harness.problems import UserError

if TYPE_CHECKING:
    from harness.config import Run
    from harness.reading import Records

COLUMNS = ["machine", "workload", "submission", "round", "steps", "seconds", "build_seconds", "compile_seconds"]


@dataclass(frozen=True)
class Timings:
    """`costs` has a row per (submission, workload): seconds_per_step, its relative error (one standard error of the
    median, as a share), and one_off seconds."""

    machine: str
    rounds: int
    costs: pd.DataFrame

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Timings:
        """From the rows of `measure`; rounds count from 1, and one-off costs are the same in all."""
        keys = ["submission", "workload"]
        rates = rows.assign(rate=rows["seconds"] / rows["steps"])
        groups = rates.groupby(keys)
        median = groups["rate"].median()
        spread = (rates.set_index(keys)["rate"] - median).abs().groupby(keys).median()
        # 1.4826 MAD estimates a deviation, and a median of n has 1.2533 times the standard error of a mean.
        error: pd.Series = 1.2533 * 1.4826 * spread / np.sqrt(groups.size()) / median
        one_off = groups["build_seconds"].first() + groups["compile_seconds"].first()
        costs = pd.DataFrame({"seconds_per_step": median, "error": error, "one_off": one_off})
        return cls(str(rows["machine"].iloc[0]), int(rows["round"].max()), costs)

    @property
    def sentence(self) -> str:
        return (
            f"Seconds are steps-to-target x median seconds per step (+ building and compiling) of a timing run of "
            f"{self.rounds} alternating rounds on {self.machine}; the median is known to "
            f"{100 * self.costs['error'].max():.1f}% or better."
        )

    def apply(self, trials: pd.DataFrame) -> pd.DataFrame:
        """`trials` with seconds, resolution, limit and budget (of as many steps as anyone trained on the workload) in
        seconds of this timing run. UserError names what it lacks, or the studies that were pruned."""
        _refuse_pruned(trials)
        keys = pd.MultiIndex.from_frame(trials[["submission", "workload"]])
        lacking = sorted(set(keys) - set(self.costs.index))
        if lacking:
            listed = ", ".join(f"{s} on {w}" for s, w in lacking[:6])
            raise UserError(f"the timing run has no {listed}; run scripts/timing.py on these records again")
        costs = self.costs.reindex(keys)
        rate, once = costs["seconds_per_step"].to_numpy(), costs["one_off"].to_numpy()
        return trials.assign(
            seconds=trials["steps"] * rate + once,
            resolution=trials["resolution_steps"] * rate,
            limit=trials["limit_steps"] * rate + once,
            budget=trials.groupby("workload")["limit_steps"].transform("max") * rate + once,
        )


def read(path: Path) -> Timings:
    """A file of scripts/timing.py; UserError if it is not one."""
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--timing {path} cannot be read ({error}); make it with scripts/timing.py") from error
    missing = [column for column in COLUMNS if column not in rows]
    numbers = [column for column in COLUMNS[3:] if column in rows and not pd.api.types.is_numeric_dtype(rows[column])]
    what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"{', '.join(numbers)} are no numbers"] * bool(numbers)
    if what or rows.empty:
        raise UserError(f"--timing {path} {'; '.join(what) or 'is empty'}; make it with scripts/timing.py")
    usable = np.isfinite(rows[COLUMNS[3:]].to_numpy(float)).all(axis=1)
    bad = rows[~usable | (rows["steps"] <= 0) | (rows["seconds"] <= 0)]
    if len(bad):
        raise UserError(f"--timing {path}, row {bad.index[0] + 2}: steps and seconds must be positive and finite")
    if rows["machine"].nunique() > 1:
        raise UserError(
            f"--timing {path} mixes machines ({', '.join(rows['machine'].unique())}); one table, one machine"
        )
    return Timings.of(rows)


def _refuse_pruned(trials: pd.DataFrame) -> None:
    """With other seconds than those it was stopped by, a pruned trial might have been the best of its study."""
    pruned = trials[trials["status"] == "pruned"]
    if len(pruned):
        listed = ", ".join(sorted({str(name) for name in pruned["submission"]}))
        raise UserError(
            f"{len(pruned)} trials of {listed} were pruned, so a timing run cannot tell the times of their studies; "
            "leave --timing out, or run them again with pruning=none and label=NAME"
        )


def measure(
    runs: dict[str, Run],
    *,
    rounds: int = 15,
    seconds_per_segment: float = 0.5,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Time the submissions `runs` (by label) of one workload; a row per submission and round, columns COLUMNS.

    A first round, which also compiles, is not counted; it sets the length of the segments, the same number of steps for
    all, so that each lasts about `seconds_per_segment`. Under torchrun all processes share the segments.
    """
    from harness import machine
    from harness.environment import configure_torch, device_of, private_compiler_cache
    from harness.needs import Need
    from harness.ranks import join
    from harness.training import Training
    from harness.trial import check_ranks, load_workload

    first = next(iter(runs.values()))
    check_ranks(first)
    device = device_of(first)
    configure_torch(first, device)
    ranks = join()
    where = machine.folder_of(device, first.threads)
    workload = load_workload(first, device)
    name, nominal = workload.facts.full_name, workload.facts.nominal_batch
    trainings: dict[str, Training] = {}
    once: dict[str, dict[str, float]] = {}
    steps = 1

    def segment(label: str, length: int) -> float:
        training = trainings[label]
        elapsed, counters = training.clock.elapsed, training.evaluator.counters
        before, compiled = elapsed.submission, elapsed.compile
        training.segment(counters.examples + length * nominal, charge_compile=True)
        return elapsed.submission - before - (elapsed.compile - compiled)

    for label, run in runs.items():
        training = trainings[label] = Training(run, workload, device, ranks)
        with private_compiler_cache(Need.OWN_COMPILATION in training.needs):
            training.build()
            segment(label, 2)
        elapsed = training.clock.elapsed
        once[label] = {"build_seconds": elapsed.build, "compile_seconds": elapsed.compile}
        steps = max(steps, math.ceil(seconds_per_segment / max(segment(label, 2) / 2, 1e-6)))
    steps = ranks.agree(min(steps, max(2, workload.facts.max_steps // (rounds + 1))))
    order, shuffle = list(runs), random.Random(seed)
    rows = []
    for number in range(1, rounds + 1):
        shuffle.shuffle(order)
        for label in order:
            rows.append({"machine": where, "workload": name, "submission": label, "round": number, "steps": steps,
                         "seconds": segment(label, steps), **once[label]})  # fmt: skip
        if ranks.first:
            report(f"{name}: round {number} of {rounds}, {steps} steps each")
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_records(
    records: Records, workloads: Sequence[str] | None = None, submissions: Sequence[str] | None = None, rounds: int = 15
) -> pd.DataFrame:
    """Rows of `measure` for every workload of the records, or those named, from the configurations in their manifests.
    UserError for a name that they do not hold."""
    from harness.config import Run

    _refuse_pruned(records.trials)
    trials = records.trials[records.trials.index.isin(records.manifests)]
    for what, asked in (("workload", workloads), ("submission", submissions)):
        unknown, known = sorted(set(asked or ()) - set(trials[what])), sorted(set(trials[what]))
        if unknown:
            raise UserError(f"--{what}s {', '.join(unknown)}: not in the records, which hold {', '.join(known)}")
    frames = []
    for workload, group in trials.groupby("workload"):
        runs = {}
        firsts = group.drop_duplicates("submission")
        for index, label in zip(firsts.index.tolist(), firsts["submission"].tolist(), strict=True):
            if (not workloads or workload in workloads) and (not submissions or label in submissions):
                runs[label] = Run(**records.manifests[index]["config"], overwrite=False, debug=False)
        if runs:
            frames.append(measure(runs, rounds=rounds))
    return pd.concat(frames, ignore_index=True)
