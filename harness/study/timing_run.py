"""A timing run: all submissions alternate on one machine, to measure seconds per step that can be compared.

Within a round every submission trains one short segment, in random order, so that a slow phase of the machine affects
all of them. Their evaluation: harness/scoring/timings.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from harness.config.schema import Run
from harness.errors import UserError
from harness.interface.needs import Need
from harness.records.status import Status
from harness.scoring.load_records import Records
from harness.scoring.timings import COLUMNS, refuse_pruned
from harness.study.trusted_classes import check_trusted
from harness.trial.distributed import init_distributed
from harness.trial.environment import configure_torch, private_compiler_cache, select_device
from harness.trial.hardware import machine_folder
from harness.trial.training import Training
from harness.trial.trial import check_ranks, load_workload


def measure_timings(
    runs: dict[str, Run],
    *,
    rounds: int = 15,
    seconds_per_segment: float = 0.5,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Time the submissions `runs` (by label) of one workload; a row per submission and round, with columns COLUMNS.

    A first round, which also compiles, is not counted. It sets the length of the segments, the same number of steps for
    all, so that each lasts about `seconds_per_segment`. Under torchrun all processes share the segments. seed: of the
    order within a round.
    """
    first = next(iter(runs.values()))
    check_ranks(first)
    device = select_device(first)
    configure_torch(first, device)
    ranks = init_distributed()
    machine = machine_folder(device, first.threads)
    workload = load_workload(first, device)
    name, max_steps = workload.spec.full_name, workload.spec.max_steps
    trainings: dict[str, Training] = {}
    one_off: dict[str, dict[str, float]] = {}
    steps = 1
    for label, run in runs.items():
        training = trainings[label] = Training(run, workload, device, ranks)
        with private_compiler_cache(Need.OWN_COMPILATION in training.needs):
            training.build()
            # The first segment also compiles and allocates; its compilation is the submission's one-off cost.
            _time_segment(training, 2)
        elapsed = training.clock.elapsed
        one_off[label] = {"build_seconds": elapsed.build, "compile_seconds": elapsed.compile}
        seconds_per_step = _time_segment(training, 2) / 2
        # The fastest submission decides, so that no segment is shorter than asked.
        steps = max(steps, math.ceil(seconds_per_segment / max(seconds_per_step, 1e-6)))
    # All rounds together must fit into the budget, since the schedule ends there. Broadcast, since every rank has
    # measured other seconds.
    steps = ranks.broadcast(min(steps, max(2, max_steps // (rounds + 1))))
    # The same seed on every rank: they train the same submission at the same time.
    order, shuffle = list(runs), random.Random(seed)
    rows = []
    for number in range(1, rounds + 1):
        shuffle.shuffle(order)
        for label in order:
            row = {"machine": machine, "workload": name, "submission": label, "round": number, "steps": steps}
            rows.append(row | {"seconds": _time_segment(trainings[label], steps)} | one_off[label])
        if ranks.is_main:
            report(f"{name}: round {number} of {rounds}, {steps} steps each")
    return pd.DataFrame(rows, columns=COLUMNS)


def _time_segment(training: Training, steps: int) -> float:
    """Seconds on the training clock of so many nominal steps, without compilation."""
    elapsed, counters = training.clock.elapsed, training.runner.counters
    seconds, compiling = elapsed.submission, elapsed.compile
    # Charged, so that compilation is counted, and subtracted below.
    training.segment(counters.examples + steps * training.spec.nominal_batch, charge_compile=True)
    return elapsed.submission - seconds - (elapsed.compile - compiling)


def time_records(
    records: Records,
    folders: Iterable[Path],
    workloads: Sequence[str] | None = None,
    submissions: Sequence[str] | None = None,
    rounds: int = 15,
    *,
    trust: bool = False,
) -> pd.DataFrame:
    """Rows of `measure_timings` for every workload of the records, or those named, from the configurations in their
    manifests, without the trials that were refused.

    folders: where the records lie; nothing in them is imported. trust: import classes of other packages than Pacemark
    and torch too. Raises UserError for such a class without it, for a name that the records do not hold, and for pruned
    studies.
    """
    refuse_pruned(records.trials)
    trials = records.trials[records.trials.index.isin(records.manifests)]
    trials = trials[trials["status"] != Status.INVALID]
    for kind, asked in (("workload", workloads), ("submission", submissions)):
        unknown, known = sorted(set(asked or ()) - set(trials[kind])), sorted(set(trials[kind]))
        if unknown:
            raise UserError(f"--{kind}s {', '.join(unknown)}: not in the records, which hold {', '.join(known)}")
    if workloads:
        trials = trials[trials["workload"].isin(workloads)]
    if submissions:
        trials = trials[trials["submission"].isin(submissions)]
    firsts = trials.drop_duplicates(["workload", "submission"])
    names = (firsts["submission"] + " on " + firsts["workload"]).tolist()
    configs = {name: records.manifests[i].config for name, i in zip(names, firsts.index.tolist(), strict=True)}
    # All before the first import.
    check_trusted(configs, folders, trust)
    frames = []
    for _, group in trials.groupby("workload"):
        firsts = group.drop_duplicates("submission")
        runs = {
            label: Run(**records.manifests[i].config, overwrite=False, debug=False)
            for i, label in zip(firsts.index.tolist(), firsts["submission"].tolist(), strict=True)
        }
        if runs:
            frames.append(measure_timings(runs, rounds=rounds))
    return pd.concat(frames, ignore_index=True)
