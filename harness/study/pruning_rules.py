"""Stopping policies: at which evaluation a trial need not go on.

Pure functions of recorded evaluations, the same for a trial that runs (pruning_online.py) and for one that is replayed
(pruning_replay.py). The verdict at an evaluation depends on nothing that came after it.

- **exact** stops a trial when a finished sibling of its study met the target in no more steps and no more seconds than
  the trial has used: its own time and steps, if it ever met the target, would be larger by both.
- **futility** also stops a trial that is unlikely to meet its target before its deadline, or would meet it too late to
  score. The deadline is the end of the budget, the best sibling's time, or TAU_MAX times the fastest other
  submission's, whichever comes first. "Unlikely": its distance to the target exceeds the largest that any successful
  trial of another submission had at the same fraction of its own time-to-target, times a margin that shrinks towards
  the deadline.

Curves are compared at equal fractions of each trial's own time-to-target, not at equal steps, because learning-rate
decay makes early values uninformative. Comparing at equal steps, as the median rule does (Golovin et al. 2017, "Google
Vizier", section 3.2.2), punishes late decay. Trials of the same submission in other studies are never used: their
points may be the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.scoring.benchmark_score import TAU_MAX

Policy = Literal["none", "exact", "futility"]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

RESOLUTION = 200
"""Number of fractions of the time-to-target at which references are compared."""


@dataclass(frozen=True)
class Futility:
    """The constants of the futility rule; docs/pruning.md says how they were chosen."""

    margin: float = 1.2
    """Factor on the tolerated distance at the start, half of it at the deadline; smaller is stricter."""
    earliest: float = 0.05
    """Fraction of the deadline before which nothing is stopped."""
    trials: int = 10
    """Smallest number of successful trials of other submissions; with fewer, nothing is stopped by distance. Of ten,
    one is the worst of all by chance."""
    submissions: int = 2
    """Smallest number of submissions that they come from."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of a trial so far: arrays float [evaluations]. All but `distance` never decrease."""

    name: str
    """For messages: `trial 2`."""
    seconds: Array
    """On the training clock."""
    steps: Array
    """Nominal."""
    progress: Array
    """Share of the budget that is used."""
    distance: Array
    """From the best value so far to the target, in units of the metric; 0 or less: met. Infinite before any value."""

    @classmethod
    def from_columns(cls, name: str, seconds: Array, steps: Array, progress: Array, distance: Array) -> Curve:
        """From the columns of a record, float [rows]. Rows without a time are dropped; a distance that is NaN counts as
        no progress."""
        usable = np.isfinite(seconds) & np.isfinite(steps)
        seconds, steps, progress = (np.maximum.accumulate(a[usable]) for a in (seconds, steps, progress))
        # fmin ignores NaN. The leading infinity is the distance of evaluations before the first number.
        return cls(name, seconds, steps, progress, np.fmin.accumulate(np.append(np.inf, distance[usable]))[1:])

    @property
    def reached(self) -> int:
        """Index of the first evaluation that met the target; the number of evaluations if none did."""
        return int(np.count_nonzero(self.distance > 0))

    @property
    def has_reached(self) -> bool:
        """Whether the target was met."""
        return self.reached < len(self.distance)

    def until(self, count: int) -> Curve:
        """Its first `count` evaluations."""
        return Curve(self.name, *(a[:count] for a in (self.seconds, self.steps, self.progress, self.distance)))


@dataclass(frozen=True)
class References:
    """A summary of the other submissions' trials on a workload."""

    trials: int
    """How many met the target."""
    submissions: int
    """How many submissions those are of."""
    fastest_progress: float
    """Steps-to-target of the fastest submission, a median over studies, as a share of the budget; infinite: none."""
    fastest_seconds: float
    """Time-to-target of the fastest submission, a median over studies; infinite: none."""
    distance: Array
    """The largest distance to the target that a successful trial had at equal fractions of its own time-to-target:
    [RESOLUTION + 1], from its start to its target; infinite where one had not been evaluated."""

    @classmethod
    def from_trials(cls, trials: Iterable[tuple[str, int, Curve]]) -> References:
        """From (submission, study, curve) of every trial, successful or not."""
        best: dict[str, dict[int, Array]] = defaultdict(dict)
        largest = np.full(RESOLUTION + 1, -np.inf)
        count, successful = 0, set()
        for submission, study, curve in trials:
            at_target = np.full(2, np.inf)
            if curve.has_reached:
                at_target = np.array([curve.progress[curve.reached], curve.seconds[curve.reached]])
                grid = np.linspace(0, at_target[0], RESOLUTION + 1)
                # Rounding must not step over the evaluation at the target itself.
                last = np.searchsorted(curve.progress, grid * (1 + 1e-12), side="right") - 1
                # Before the first evaluation `last` is -1, which picks the infinity at the end.
                distance = np.append(curve.distance[: curve.reached + 1], np.inf)
                largest = np.maximum(largest, distance[np.minimum(last, curve.reached)])
                count += 1
                successful.add(submission)
            # The best trial counts for a study, and the median over studies for a submission, as in scores.
            best[submission][study] = np.minimum(best[submission].get(study, np.inf), at_target)
        medians = [np.median(list(studies.values()), axis=0) for studies in best.values()]
        fastest = np.min(medians, axis=0) if medians else np.full(2, np.inf)
        return cls(count, len(successful), float(fastest[0]), float(fastest[1]), largest)


NO_REFERENCES = References.from_trials(())
"""Without trials of other submissions."""


def stops(
    policy: Policy,
    trial: Curve,
    siblings: Sequence[Curve],
    references: References = NO_REFERENCES,
    rule: Futility | None = None,
    kept: int = 1,
) -> Mask:
    """At which evaluations of `trial` the policy would stop it: bool [evaluations], False from its target on.

    siblings: the finished trials of its study. references: of the other submissions, for futility. kept: how many of
    the study's best trials are looked at; so many siblings must have been faster.
    """
    verdict = np.zeros(len(trial.seconds), dtype=bool)
    if policy == "none":
        return verdict
    beaten_by = np.zeros(len(trial.seconds), dtype=int)
    for sibling in siblings:
        beaten_by += _beaten(trial, sibling)
    verdict |= beaten_by >= kept
    if policy == "futility":
        rule = rule or Futility()
        verdict |= _too_slow(trial, references)
        share, tolerated = _tolerance(trial, siblings, references, rule)
        verdict |= (share >= rule.earliest) & (trial.distance > tolerated)
    # A trial that met its target has a result that no policy may take away.
    verdict[trial.reached :] = False
    return verdict


def stop_reason(
    policy: Policy,
    trial: Curve,
    siblings: Sequence[Curve],
    references: References = NO_REFERENCES,
    rule: Futility | None = None,
    kept: int = 1,
) -> str | None:
    """Why the policy stops `trial` at its last evaluation, for the record; None to go on. Arguments as of `stops`."""
    if not len(trial.seconds) or not stops(policy, trial, siblings, references, rule, kept)[-1]:
        return None
    for sibling in siblings:
        if _beaten(trial, sibling)[-1]:
            reached = sibling.reached
            return (
                f"pruning={policy}: {sibling.name} met the target after {sibling.steps[reached]:g} steps and "
                f"{sibling.seconds[reached]:.1f} s, this trial has not after {trial.steps[-1]:g} and "
                f"{trial.seconds[-1]:.1f}"
            )
    if _too_slow(trial, references)[-1]:
        return (
            f"pruning={policy}: {TAU_MAX:g} times the time-to-target of the fastest other submission are used up, "
            "later times do not score"
        )
    share, tolerated = _tolerance(trial, siblings, references, rule or Futility())
    return (
        f"pruning={policy}: {trial.distance[-1]:.4g} from the target at {100 * share[-1]:.0f}% of the way to the "
        f"deadline, tolerated are {tolerated[-1]:.4g} by the {references.trials} successful trials of "
        f"{references.submissions} other submissions"
    )


def _beaten(trial: Curve, sibling: Curve) -> Mask:
    """Where the trial has used as many steps and seconds as the sibling needed: a target that is not met now is met
    later than the sibling's, if at all."""
    if not sibling.has_reached:
        return np.zeros(len(trial.seconds), dtype=bool)
    reached = sibling.reached
    return (trial.seconds >= sibling.seconds[reached]) & (trial.steps >= sibling.steps[reached])


def _too_slow(trial: Curve, references: References) -> Mask:
    """Where the trial has used so many steps and seconds that a time-to-target from there on scores nothing."""
    slow = trial.progress >= TAU_MAX * references.fastest_progress
    return np.asarray(slow & (trial.seconds >= TAU_MAX * references.fastest_seconds))


def _tolerance(trial: Curve, siblings: Sequence[Curve], references: References, rule: Futility) -> tuple[Array, Array]:
    """The fraction of its deadline that the trial has used, and the distance that is tolerated there; both float
    [evaluations]."""
    # Too few to tell: everything is tolerated.
    if references.trials < rule.trials or references.submissions < rule.submissions:
        return trial.progress, np.full(len(trial.progress), np.inf)
    bounds = [(TAU_MAX * references.fastest_progress, TAU_MAX * references.fastest_seconds)]
    bounds += [(s.progress[s.reached], s.seconds[s.reached]) for s in siblings if s.has_reached]
    # Bounds are in steps and in seconds; the trial's own pace turns seconds into a share of the budget. The first
    # evaluation may have a time of 0.
    pace = trial.progress / np.maximum(trial.seconds, 1e-9)
    deadline = np.ones(len(trial.progress))
    for progress, seconds in bounds:
        # A trial is late only in steps and in seconds, not where it needs more of one and less of the other.
        deadline = np.minimum(deadline, np.maximum(progress, seconds * pace))
    share = np.clip(trial.progress / np.maximum(deadline, 1e-9), 0.0, 1.0)
    # Rounded down: the reference is earlier on its way, where the distance is larger, so the rule is more lenient.
    largest = references.distance[(share * RESOLUTION).astype(int)]
    return share, rule.margin * (1 - share / 2) * largest
