"""Replaying recorded trials through a stopping policy: the compute that it saves, and the scores that it changes.

The trials of a study start in their order, one after the other or `parallel` at a time, each as soon as a slot is free;
time is the training clock of the records. When a trial ends, those that run know it from their next evaluation on. The
policy is the one of running trials (pruning_rules.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.records.status import UNUSABLE
from harness.scoring import benchmark_score
from harness.scoring.load_records import Records
from harness.study import pruning_rules
from harness.study.pruning_rules import Curve, Futility, Policy, References

SAME_TIME = 1e-9
"""Relative difference below which two times are the same."""


@dataclass(frozen=True)
class Replay:
    """The effect of a policy on recorded trials."""

    seconds_share: float
    """Seconds used under the policy, as a share of those recorded, over the trials that it could stop."""
    steps_share: float
    """The same of nominal steps."""
    stopped: int
    """Trials cut short, of `trials`."""
    trials: int
    """Trials that it could stop."""
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
        """The same of the score by steps."""
        return float((self.scores["steps_score"] - self.scores["steps_score_before"]).abs().max())

    @property
    def ranks_changed(self) -> int:
        """Submissions whose rank changed."""
        return int((self.scores["rank"] != self.scores["rank_before"]).sum())

    @property
    def flipped(self) -> int:
        """Cells (submission, workload) that were reached and no longer are; none flips the other way."""
        return int(np.isinf(self.cells["seconds"]).sum())

    @property
    def lost(self) -> int:
        """The flipped cells that had given a score."""
        return int((np.isinf(self.cells["seconds"]) & self.cells["counted"]).sum())


def make_curves(records: Records) -> dict[int, Curve]:
    """The curve of every trial that has one, by row label of `records.trials`.

    The budget is the workload's steps where the manifests state it, else, as in AlgoPerf, the seconds of the workload's
    longest trial.
    """
    trials, rows = records.trials, records.rows
    if not len(rows.trial):
        raise UserError("a table of trials has no curves to replay; give the folders of records")
    longest = trials.groupby("workload")["limit_seconds"].transform("max")
    curves = {}
    columns = (trials["workload"], trials["trial"], trials["status"], longest)
    for i, workload, number, status, budget in zip(trials.index.tolist(), *(c.tolist() for c in columns), strict=True):
        of_trial = rows.rows_of(i)
        # Trials without rows have no curve, and are left as they are.
        if of_trial.start == of_trial.stop or status in UNUSABLE:
            continue
        target = records.targets.targets[workload]
        # Positive while the target is not met, whatever the direction.
        sign = 1.0 if target.direction == "min" else -1.0
        seconds, steps = rows.seconds[of_trial], rows.steps[of_trial]
        max_steps = records.manifests[i].max_steps if i in records.manifests else None
        progress = steps / max_steps if max_steps else seconds / budget
        distance = sign * (rows.value[of_trial] - target.value)
        curves[i] = Curve.from_columns(f"trial {number}", seconds, steps, progress, distance)
    return curves


def replay(
    records: Records,
    policy: Policy,
    *,
    parallel: int = 1,
    rule: Futility | None = None,
    stop: Collection[str] | None = None,
    look_at: Collection[str] | None = None,
) -> Replay:
    """Run every study again under `policy`.

    parallel: trials of a study at a time. stop: the submissions whose trials may be stopped, and whose compute counts
    (default: all). look_at: those whose trials may serve as references (default: all); never the trial's own. Raises
    UserError for a submission that is not there.
    """
    trials, curves = records.trials, make_curves(records)
    names = set(trials["submission"])
    unknown = sorted((set(stop or ()) | set(look_at or ())) - names)
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no such submission in the records, which hold {', '.join(sorted(names))}"
        )
    stop, look_at = names if stop is None else set(stop), names if look_at is None else set(look_at)
    ends: dict[int, int] = {}
    for _, of_workload in trials[trials.index.isin(curves)].groupby("workload", sort=False):
        for name, of_submission in of_workload.groupby("submission"):
            if name not in stop:
                continue
            # One for all studies of the submission: references do not depend on its own trials.
            references = pruning_rules.NO_REFERENCES
            if policy == "futility":
                others = of_workload[of_workload["submission"].isin(look_at - {name})]
                columns = (others["submission"].tolist(), others["study"].tolist(), others.index.tolist())
                references = References.from_trials((s, study, curves[i]) for s, study, i in zip(*columns, strict=True))
            for _, study in of_submission.sort_values("trial").groupby("study"):
                members = [curves[i] for i in study.index]
                ends |= zip(study.index, replay_study(policy, members, references, rule, parallel), strict=True)
    # An end at the last evaluation is the end that the trial had anyway.
    cut = {i: end for i, end in ends.items() if end < len(curves[i].seconds)}
    return _compare(records, curves, cut, stop)


def replay_study(
    policy: Policy,
    trials: Sequence[Curve],
    references: References = pruning_rules.NO_REFERENCES,
    rule: Futility | None = None,
    parallel: int = 1,
) -> list[int]:
    """The number of evaluations that each trial of a study makes under `policy`, in their order."""
    ends = [len(trial.seconds) for trial in trials]
    started = [0.0] * len(trials)
    finished: list[Curve] = []
    waiting = list(range(len(trials)))
    running: list[int] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < parallel:
            started[waiting[0]] = now
            running.append(waiting.pop(0))
        for number in running:
            trial = trials[number]
            verdict = pruning_rules.stops(policy, trial, finished, references, rule)
            # Evaluations before `now` were decided when fewer trials had finished; those verdicts are not revised.
            verdict &= started[number] + trial.seconds >= now
            if verdict.any():
                ends[number] = int(np.argmax(verdict)) + 1
        # The next to end, by what is known now; the lower number among equals.
        now, number = min((_end_time(trials[i], started[i], ends[i]), i) for i in running)
        running.remove(number)
        finished.append(trials[number].until(ends[number]))
    return ends


def _end_time(trial: Curve, started: float, end: int) -> float:
    return started + (float(trial.seconds[end - 1]) if end else 0.0)


def _compare(records: Records, curves: dict[int, Curve], cut: dict[int, int], stop: set[str]) -> Replay:
    """The effect of cutting trials. cut: number of evaluations that are left, by row label of `records.trials`."""
    before = records.trials[records.trials["status"] != "duplicate"]
    # A policy never stops a trial at or after its target, so a trial that was cut did not meet it.
    lost = before.index.isin(cut)
    after = before.assign(**{c: before[c].mask(lost) for c in ("seconds", "steps", "index")})
    scores: dict[str, pd.Series] = {}
    times: dict[str, pd.DataFrame] = {}
    worth: dict[str, pd.DataFrame] = {}
    for when, table in (("_before", before), ("", after)):
        for unit, name in (("seconds", "score"), ("steps", "steps_score")):
            medians = benchmark_score.times_to_target(benchmark_score.study_times(table, unit), unit)
            counted = benchmark_score.qualified(medians, records.targets)
            scores[f"{name}{when}"] = pd.Series(benchmark_score.benchmark_scores(counted.to_numpy()), counted.index)
            times[f"{unit}{when}"] = medians
            worth[f"{unit}{when}"] = counted < np.inf
    frame = pd.DataFrame(scores)
    for when in ("", "_before"):
        # Rounded, since the last bits of equal scores may differ and would make two ranks.
        frame[f"rank{when}"] = frame[f"score{when}"].round(9).rank(ascending=False, method="min").astype(int)
    cells = pd.DataFrame({c: times[c].stack(future_stack=True) for c in ("seconds", "seconds_before")}).dropna()
    scored = worth["seconds_before"].stack(future_stack=True).reindex(cells.index)
    cells["counted"] = scored.fillna(False).astype(bool)
    changed = ~np.isclose(cells["seconds"], cells["seconds_before"], rtol=SAME_TIME, atol=0.0)
    stoppable = [i for i in curves if records.trials.at[i, "submission"] in stop]
    used, total = np.zeros(2), np.zeros(2)
    for i in stoppable:
        clock = np.array([curves[i].seconds, curves[i].steps])
        if clock.shape[1]:
            total += clock[:, -1]
            # Index -1, the last evaluation, for a trial that was not cut.
            used += clock[:, cut.get(i, 0) - 1]
    # Without stoppable trials both are 0.
    shares = used / np.maximum(total, 1e-9)
    return Replay(float(shares[0]), float(shares[1]), len(cut), len(stoppable), frame, cells[changed].reset_index())
