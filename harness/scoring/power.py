"""What a study will be able to tell before it has started, and how much luck a tuning had.

Derivation: docs/statistics.md, section 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from harness.scoring.comparisons import POWER

Array = NDArray[np.float64]
USUAL_VARIATION = 0.05
"""Standard deviation of log time where a workload has none measured: the largest with which one is accepted."""
MOST_SEEDS = 1000
"""More are not looked for."""


@dataclass(frozen=True)
class WorkloadNoise:
    """What is known of the times on a workload before anybody has trained."""

    sigma: float
    """Standard deviation of log time between seeds."""
    spacing: float
    """Of evaluations, relative to the time to the target."""


def workload_noise(provenance: dict[str, object] | None, eval_every: int, max_steps: int) -> WorkloadNoise:
    """The noise that the measurement of the target found (`target_provenance`), else the usual one."""
    provenance = provenance or {}
    variation, steps = provenance.get("coefficient_of_variation"), provenance.get("steps_to_target")
    hits = [step for step in steps if isinstance(step, int | float)] if isinstance(steps, list) else []
    time = float(np.mean(hits)) if hits else max_steps
    return WorkloadNoise(float(variation) if isinstance(variation, float) else USUAL_VARIATION, eval_every / time)


def detectable_difference(noises: Sequence[WorkloadNoise], seeds: int, level: float = 0.95) -> float:
    """The smallest ratio of times of two submissions that `seeds` studies of each detect in four of five cases
    (docs/statistics.md, eq. 50); infinite below the degrees of freedom that intervals need."""
    dof = 2 * len(noises) * (seeds - 1)
    if dof < 1:
        return np.inf
    variance = sum(2 * (noise.sigma**2 / seeds + noise.spacing**2 / 12) for noise in noises) / len(noises) ** 2
    quantiles = stats.t.ppf((1 + level) / 2, dof) + stats.t.ppf(POWER, dof)
    return float(np.exp(quantiles * np.sqrt(variance)))


def seeds_needed(noises: Sequence[WorkloadNoise], ratio: float) -> int | None:
    """The smallest number of seeds with which a ratio of times is detected; None where no number does, since the error
    of the crossings stays."""
    return next((n for n in range(2, MOST_SEEDS + 1) if detectable_difference(noises, n) <= ratio), None)


# ---- the luck of a tuning ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Luck:
    """What the best of as many points, drawn anew from those that were tried, needs more than the best of these."""

    factors: Array
    """Of time, ascending from 1: [points]; infinite for points that missed the target."""
    weights: Array
    """Their probabilities: [points]."""

    @property
    def expected(self) -> float:
        """The geometric mean of the factors among draws that meet the target; NaN without any."""
        is_met = np.isfinite(self.factors)
        total = self.weights[is_met].sum()
        return float(np.exp((self.weights[is_met] * np.log(self.factors[is_met])).sum() / total)) if total else np.nan

    @property
    def missed(self) -> float:
        """The probability that no point meets the target."""
        return float(self.weights[~np.isfinite(self.factors)].sum())

    def quantile(self, probability: float) -> float:
        """The smallest factor that is not exceeded with this probability."""
        reached = np.searchsorted(np.cumsum(self.weights), probability * (1 - 1e-12))
        return float(self.factors[min(int(reached), len(self.factors) - 1)])


def tuning_luck(times: Array) -> Luck:
    """The luck of a tuning of which these are the times of its points, infinite for a miss: [points], one at least
    finite (docs/statistics.md, eq. 51 and 52)."""
    ascending = np.sort(times)
    k = len(ascending)
    survival = ((k - np.arange(k + 1)) / k) ** k
    return Luck(ascending / ascending[0], survival[:-1] - survival[1:])


def budget_interval(low: float, high: float, luck: Luck, level: float = 0.95) -> tuple[float, float]:
    """The interval of the time that this budget of tuning gives, from that of the confirmed setting, low to high
    (docs/statistics.md, eq. 53). The upper end is infinite where it may miss the target."""
    if not np.isfinite(high):
        return low, np.inf
    middle, scale = np.log(low * high) / 2, max(np.log(high / low) / 2 / stats.norm.ppf((1 + level) / 2), 1e-12)
    is_met = np.isfinite(luck.factors)
    weights, shifts = luck.weights[is_met], np.log(luck.factors[is_met])

    def end(probability: float) -> float:
        if probability >= weights.sum():
            return np.inf
        lowest, highest = middle - 10 * scale, middle + shifts.max() + 10 * scale
        root = optimize.brentq(
            lambda x: float((weights * stats.norm.cdf((x - middle - shifts) / scale)).sum()) - probability,
            lowest,
            highest,
        )
        return float(np.exp(root))

    return end((1 - level) / 2), end((1 + level) / 2)
