"""Replaying recorded trials through a stopping policy: what it would have saved, and what it would have changed.

The trials of a study start in their order, one after the other or `parallel` at a time, each as soon as a place is
free; time is the training clock of the records. Whenever a trial ends, those that run know it from their next
evaluation on. The policy is the one of running trials (harness/pruning.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness import pruning, scoring
from harness.problems import UserError
from harness.pruning import Curve, Futility, Policy, References
from harness.reading import Records

SAME = 1e-9
"""Relative: a time that differs by less is the same."""


@dataclass(frozen=True)
class Replay:
    """What a policy does to recorded trials."""

    seconds_share: float
    """Of the seconds that the trials it could stop had used, the share that it leaves."""
    steps_share: float
    stopped: int
    """Trials cut short, of `trials`."""
    trials: int
    scores: pd.DataFrame
    """By submission: score, score_before, rank, rank_before, steps_score, steps_score_before."""
    cells: pd.DataFrame
    """Cells (submission, workload) whose time-to-target, a median over studies, changed: submission, workload, seconds,
    seconds_before (infinite where missed), and counted: whether the time before gave the submission a score."""

    @property
    def error(self) -> float:
        """Largest absolute change of a benchmark score."""
        return float((self.scores["score"] - self.scores["score_before"]).abs().max())

    @property
    def steps_error(self) -> float:
        return float((self.scores["steps_score"] - self.scores["steps_score_before"]).abs().max())

    @property
    def ranks_changed(self) -> int:
        return int((self.scores["rank"] != self.scores["rank_before"]).sum())

    @property
    def flipped(self) -> int:
        """Cells that were reached and no longer are; nothing flips the other way."""
        return int(np.isinf(self.cells["seconds"]).sum())

    @property
    def lost(self) -> int:
        """Those of them that gave a score."""
        return int((np.isinf(self.cells["seconds"]) & self.cells["counted"]).sum())


def curves(records: Records) -> dict[int, Curve]:
    """The curve of every trial that has one, by row label of `records.trials`.

    The budget is the workload's steps where the manifests state it, else, as in AlgoPerf, the seconds of the workload's
    longest trial.
    """
    trials, rows = records.trials, records.rows
    if not len(rows.trial):
        raise UserError("a consolidated table has no curves to replay; give the folders of records")
    longest = trials.groupby("workload")["limit_seconds"].transform("max")
    found = {}
    columns = (trials["workload"], trials["trial"], trials["status"], longest)
    for i, workload, number, status, budget in zip(trials.index.tolist(), *(c.tolist() for c in columns), strict=True):
        where = rows.of(i)
        if where.start == where.stop or status in ("duplicate", "invalid", "missing"):
            continue
        target = records.targets.targets[workload]
        sign = 1.0 if target.direction == "min" else -1.0
        seconds, steps = rows.seconds[where], rows.steps[where]
        most = records.manifests.get(i, {}).get("config", {}).get("workload", {}).get("max_steps")
        progress = steps / most if most else seconds / budget
        distance = sign * (rows.value[where] - target.value)
        found[i] = Curve.of(f"trial {number}", seconds, steps, progress, distance)
    return found


def replay(
    records: Records,
    policy: Policy,
    *,
    parallel: int = 1,
    rule: Futility | None = None,
    stop: Collection[str] | None = None,
    look_at: Collection[str] | None = None,
) -> Replay:
    """Run every study again under `policy`. UserError for a submission that is not there.

    parallel: trials of a study at a time. stop: the submissions whose trials may be stopped, and whose compute counts
    (default: all). look_at: those whose trials may serve as references (default: all); never the trial's own.
    """
    trials, known = records.trials, curves(records)
    names = set(trials["submission"])
    unknown = sorted((set(stop or ()) | set(look_at or ())) - names)
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no such submission in the records, which hold {', '.join(sorted(names))}"
        )
    stop, look_at = names if stop is None else set(stop), names if look_at is None else set(look_at)
    cut: dict[int, int] = {}
    for _, of_workload in trials[trials.index.isin(known)].groupby("workload", sort=False):
        for name, own in of_workload.groupby("submission"):
            if name not in stop:
                continue
            references = pruning.NOTHING
            if policy == "futility":
                others = of_workload[of_workload["submission"].isin(look_at - {name})]
                columns = (others["submission"].tolist(), others["study"].tolist(), others.index.tolist())
                references = References.of((s, study, known[i]) for s, study, i in zip(*columns, strict=True))
            for _, study in own.sort_values("trial").groupby("study"):
                members = [known[i] for i in study.index]
                ends = replay_study(policy, members, references, rule, parallel)
                cut |= {i: end for i, end, c in zip(study.index, ends, members, strict=True) if end < len(c.seconds)}
    return _compare(records, known, cut, stop)


def replay_study(
    policy: Policy,
    trials: Sequence[Curve],
    references: References = pruning.NOTHING,
    rule: Futility | None = None,
    parallel: int = 1,
) -> list[int]:
    """The number of evaluations that each trial of a study makes under `policy`, in their order."""
    ends = [len(trial.seconds) for trial in trials]
    began = [0.0] * len(trials)
    finished: list[Curve] = []
    running: list[tuple[float, int]] = []
    """(time at which it will have ended, number of the trial); revised whenever another ends."""
    waiting = list(range(len(trials)))
    now = 0.0
    while waiting or running:
        while waiting and len(running) < parallel:
            began[waiting[0]] = now
            running.append((0.0, waiting.pop(0)))
        for place, (_, number) in enumerate(running):
            trial = trials[number]
            verdict = pruning.stops(policy, trial, finished, references, rule)
            # What came out before `now` was decided with what was known then.
            verdict &= began[number] + trial.seconds >= now
            if verdict.any():
                ends[number] = int(np.argmax(verdict)) + 1
            last = trial.seconds[ends[number] - 1] if ends[number] else 0.0
            running[place] = (began[number] + last, number)
        heapq.heapify(running)
        now, number = heapq.heappop(running)
        finished.append(trials[number].until(ends[number]))
    return ends


def _compare(records: Records, known: dict[int, Curve], cut: dict[int, int], stop: set[str]) -> Replay:
    before = records.trials[records.trials["status"] != "duplicate"]
    # A policy never stops a trial at or after its target, so a trial that was cut did not meet it.
    lost = before.index.isin(cut)
    after = before.assign(**{c: before[c].mask(lost) for c in ("seconds", "steps", "index")})
    scores: dict[str, pd.Series] = {}
    times: dict[str, pd.DataFrame] = {}
    worth: dict[str, pd.DataFrame] = {}
    for when, table in (("_before", before), ("", after)):
        for unit, name in (("seconds", "score"), ("steps", "steps_score")):
            medians = scoring.times_to_target(scoring.study_times(table, unit), unit)
            counted = scoring.qualified(medians, records.targets)
            scores[f"{name}{when}"] = pd.Series(scoring.benchmark_scores(counted.to_numpy()), counted.index)
            times[f"{unit}{when}"] = medians
            worth[f"{unit}{when}"] = counted < np.inf
    frame = pd.DataFrame(scores)
    for when in ("", "_before"):
        frame[f"rank{when}"] = frame[f"score{when}"].round(9).rank(ascending=False, method="min").astype(int)
    cells = pd.DataFrame({c: times[c].stack(future_stack=True) for c in ("seconds", "seconds_before")}).dropna()
    scored = worth["seconds_before"].stack(future_stack=True).reindex(cells.index)
    cells["counted"] = scored.fillna(False).astype(bool)
    changed = ~np.isclose(cells["seconds"], cells["seconds_before"], rtol=SAME, atol=0.0)
    own = [i for i in known if records.trials.at[i, "submission"] in stop]
    used, total = np.zeros(2), np.zeros(2)
    for i in own:
        clock = np.array([known[i].seconds, known[i].steps])
        if clock.shape[1]:
            total += clock[:, -1]
            used += clock[:, cut.get(i, 0) - 1]
    shares = used / np.maximum(total, 1e-9)
    return Replay(float(shares[0]), float(shares[1]), len(cut), len(own), frame, cells[changed].reset_index())
