"""Stopping policies: at which evaluation a trial need not go on.

Pure functions of recorded evaluations, the same for a trial that runs (harness/pruner.py) and for one that is replayed
(harness/replay.py). What a policy says at an evaluation depends on nothing that came after it.

- **exact** stops a trial when a finished sibling of its study met the target in no more steps and no more seconds than
  the trial has used: its own time and steps, if it ever met the target, would be larger by both.
- **futility** also stops a trial that will hardly meet its target before its deadline, or too late to score. The
  deadline is the end of the budget, the best sibling's time, or TAU_MAX times the fastest other submission's,
  whichever comes first. "Hardly": its distance to the target exceeds the largest that any successful trial of another
  submission had at the same share of its own way to the target, times a margin that shrinks towards the deadline.

Stretching the time axis until every successful trial ends at the deadline keeps decaying schedules comparable, under
which early values say little: a trial is compared with others as far from their end as it is from its own. Comparing at
equal steps, as the median rule does (Golovin et al. 2017, "Google Vizier", section 3.2.2), punishes those that decay
late. Trials of the same submission in other studies are never looked at: their points may be the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.scoring import TAU_MAX

Policy = Literal["none", "exact", "futility"]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

RESOLUTION = 200
"""Points of the way to the target at which references are compared."""


@dataclass(frozen=True)
class Futility:
    """The constants of the futility rule; docs/pruning.md says how they were chosen."""

    margin: float = 1.2
    """Strictness, smaller is stricter: of the distance that is tolerated, at the start; half of it at the deadline."""
    earliest: float = 0.05
    """Share of the way to the deadline before which nothing is stopped."""
    trials: int = 10
    """Successful trials of other submissions that it takes; of ten, one is the worst of all by chance."""
    submissions: int = 2
    """Submissions that those must come from."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of a trial so far: arrays float [evaluations], none of which ever falls but `distance`."""

    name: str
    """As a sibling calls it: `trial 2`."""
    seconds: Array
    """On the training clock."""
    steps: Array
    """Nominal."""
    progress: Array
    """Share of the budget that is used."""
    distance: Array
    """From the best value so far to the target, in units of the metric; 0 or less: met. Infinite before any value."""

    @classmethod
    def of(cls, name: str, seconds: Array, steps: Array, progress: Array, distance: Array) -> Curve:
        """From the columns of a record: rows without a time are dropped, a distance that is no number says nothing."""
        usable = np.isfinite(seconds) & np.isfinite(steps)
        seconds, steps, progress = (np.maximum.accumulate(a[usable]) for a in (seconds, steps, progress))
        return cls(name, seconds, steps, progress, np.fmin.accumulate(np.append(np.inf, distance[usable]))[1:])

    @property
    def reached(self) -> int:
        """Index of the first evaluation that met the target; the number of evaluations if none did."""
        return int(np.count_nonzero(self.distance > 0))

    @property
    def has_reached(self) -> bool:
        return self.reached < len(self.distance)

    def until(self, count: int) -> Curve:
        """Its first `count` evaluations."""
        return Curve(self.name, *(a[:count] for a in (self.seconds, self.steps, self.progress, self.distance)))


@dataclass(frozen=True)
class References:
    """What the other submissions' trials on a workload tell."""

    trials: int
    """How many met the target."""
    submissions: int
    """How many submissions those are of."""
    fastest_progress: float
    """Time-to-target, a median over studies, of the fastest submission as a share of the budget; infinite: none."""
    fastest_seconds: float
    distance: Array
    """The largest distance to the target that a successful trial had at equal shares of its own way there:
    [RESOLUTION + 1], from its start to its target; infinite where one had not been evaluated."""

    @classmethod
    def of(cls, trials: Iterable[tuple[str, int, Curve]]) -> References:
        """From (submission, study, curve) of every trial, successful or not."""
        best: dict[str, dict[int, Array]] = defaultdict(dict)
        largest = np.full(RESOLUTION + 1, -np.inf)
        count, successful = 0, set()
        for submission, study, curve in trials:
            at_target = np.full(2, np.inf)
            if curve.has_reached:
                at_target = np.array([curve.progress[curve.reached], curve.seconds[curve.reached]])
                way = np.linspace(0, at_target[0], RESOLUTION + 1)
                # Rounding must not step over the evaluation at the target itself.
                last = np.searchsorted(curve.progress, way * (1 + 1e-12), side="right") - 1
                seen = np.append(curve.distance[: curve.reached + 1], np.inf)
                largest = np.maximum(largest, seen[np.minimum(last, curve.reached)])
                count += 1
                successful.add(submission)
            best[submission][study] = np.minimum(best[submission].get(study, np.inf), at_target)
        medians = [np.median(list(studies.values()), axis=0) for studies in best.values()]
        fastest = np.min(medians, axis=0) if medians else np.full(2, np.inf)
        return cls(count, len(successful), float(fastest[0]), float(fastest[1]), largest)


NOTHING = References.of(())


def stops(
    policy: Policy,
    trial: Curve,
    siblings: Sequence[Curve],
    references: References = NOTHING,
    rule: Futility | None = None,
) -> Mask:
    """At which evaluations of `trial` the policy would stop it: bool [evaluations], False from its target on.

    siblings: the trials of its study that have finished. references: of the other submissions, for futility.
    """
    verdict = np.zeros(len(trial.seconds), dtype=bool)
    if policy == "none":
        return verdict
    for sibling in siblings:
        verdict |= _beaten(trial, sibling)
    if policy == "futility":
        rule = rule or Futility()
        verdict |= _too_slow(trial, references)
        share, tolerated = _tolerance(trial, siblings, references, rule)
        verdict |= (share >= rule.earliest) & (trial.distance > tolerated)
    verdict[trial.reached :] = False
    return verdict


def reason(
    policy: Policy,
    trial: Curve,
    siblings: Sequence[Curve],
    references: References = NOTHING,
    rule: Futility | None = None,
) -> str | None:
    """Why the policy stops `trial` at its last evaluation, in words; None to go on. Arguments as of `stops`."""
    if not len(trial.seconds) or not stops(policy, trial, siblings, references, rule)[-1]:
        return None
    for sibling in siblings:
        if _beaten(trial, sibling)[-1]:
            at = sibling.reached
            return (
                f"pruning={policy}: {sibling.name} met the target after {sibling.steps[at]:g} steps and "
                f"{sibling.seconds[at]:.1f} s, this trial has not after {trial.steps[-1]:g} and {trial.seconds[-1]:.1f}"
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
    """No more is as good as fewer: a target that is not met now is met in more steps, if at all."""
    at = sibling.reached
    if not sibling.has_reached:
        return np.zeros(len(trial.seconds), dtype=bool)
    return (trial.seconds >= sibling.seconds[at]) & (trial.steps >= sibling.steps[at])


def _too_slow(trial: Curve, references: References) -> Mask:
    slow = trial.progress >= TAU_MAX * references.fastest_progress
    return np.asarray(slow & (trial.seconds >= TAU_MAX * references.fastest_seconds))


def _tolerance(trial: Curve, siblings: Sequence[Curve], references: References, rule: Futility) -> tuple[Array, Array]:
    """The share of the way to the deadline that is behind the trial, and the distance that is tolerated there."""
    if references.trials < rule.trials or references.submissions < rule.submissions:
        return trial.progress, np.full(len(trial.progress), np.inf)
    bounds = [(TAU_MAX * references.fastest_progress, TAU_MAX * references.fastest_seconds)]
    bounds += [(s.progress[s.reached], s.seconds[s.reached]) for s in siblings if s.has_reached]
    pace = trial.progress / np.maximum(trial.seconds, 1e-9)
    deadline = np.ones(len(trial.progress))
    for progress, seconds in bounds:
        # In steps and in seconds: who needs more of one and less of the other is not late.
        deadline = np.minimum(deadline, np.maximum(progress, seconds * pace))
    share = np.clip(trial.progress / np.maximum(deadline, 1e-9), 0.0, 1.0)
    largest = references.distance[(share * RESOLUTION).astype(int)]
    return share, rule.margin * (1 - share / 2) * largest
