"""The noise that all cells of a table share: its standard deviation, and how far it goes with the seed.

Study k of every submission sees the same data order, so the times of one study may vary together. Where they do, a
difference of two submissions is known better than its two times. Derivations: docs/statistics.md, sections 3 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.scoring.study_table import Array, StudyTable

MIN_DOF = 4
"""Pooled degrees of freedom below which there is no interval: a t quantile above 2.8 says little."""
PAIRING_LEVEL = 0.01
"""Level of the one-sided F test for a common correlation above zero. It is strict, since a false positive
underestimates the paired variance: more than 5% of equal pairs would be called different."""


@dataclass(frozen=True)
class Pairing:
    """What the noise of submissions under the same seed has in common."""

    correlation: float
    """Of log times under the same seed; 0 unless the test shows it to be positive."""
    dof: float
    """Degrees of freedom of the variance of a paired difference."""
    efficiency: float
    """Effective over nominal degrees of freedom of the pooled variance, at most 1: correlated residuals repeat each
    other (docs/statistics.md, eq. 26)."""
    sentence: str
    """What was decided and why, for the reader of a board."""


@dataclass(frozen=True)
class PooledNoise:
    """The standard deviation of log time between studies, pooled over all cells."""

    sigma: float
    dof: float
    pairing: Pairing


def pooled_noise(table: StudyTable) -> PooledNoise:
    """The noise, estimated from the hits alone (docs/statistics.md, eq. 11, 12), and whether to pair by seed."""
    dof = float(np.maximum(table.hit_count - 1, 0).sum())
    residuals = table.residuals
    sigma = max(float(np.sqrt((residuals**2).sum() / max(dof, 1))), table.resolution_sd)
    return PooledNoise(sigma, dof, _choose_pairing(_mean_squares(table, residuals), dof))


@dataclass(frozen=True)
class _MeanSquares:
    """Sums of squares of the complete blocks, summed over workloads: between the studies, and what is left."""

    between: float
    between_dof: int
    within: float
    within_dof: int
    block_size: float
    """Submissions of a block, averaged over workloads by their degrees of freedom between studies."""


def _mean_squares(table: StudyTable, residuals: Array) -> _MeanSquares:
    """Sums of squares of a two-way layout without interaction (docs/statistics.md, eq. 23).

    A workload's block holds the submissions that met the target in all of its studies; it takes two of each.
    """
    between = within = 0.0
    between_dof = within_dof = weighted_size = 0
    for w in range(len(table.workloads)):
        has_study = (table.is_hit | table.is_miss)[:, w].any(axis=0)
        # The two-way layout needs every submission in every study. A miss has no residual, so a submission with one is
        # left out of the workload's block.
        is_complete = table.is_hit[:, w][:, has_study].all(axis=1)
        if is_complete.sum() < 2 or has_study.sum() < 2:
            continue
        block = residuals[:, w][np.ix_(is_complete, has_study)]
        submissions, studies = block.shape
        study_means = block.mean(axis=0)
        between += submissions * (study_means**2).sum()
        within += ((block - study_means) ** 2).sum()
        between_dof += studies - 1
        within_dof += (studies - 1) * (submissions - 1)
        weighted_size += submissions * (studies - 1)
    return _MeanSquares(between, between_dof, within, within_dof, weighted_size / max(between_dof, 1))


def _choose_pairing(squares: _MeanSquares, dof: float) -> Pairing:
    """Pair by seed where the F test shows a positive correlation (docs/statistics.md, eq. 24 to 26)."""
    # Without residual variation the F ratio would be infinite.
    if squares.within_dof < MIN_DOF or squares.within <= 0:
        return Pairing(0.0, dof, 1.0, "pairs not paired by seed: too few complete studies to see whether that helps")
    between, within = squares.between / squares.between_dof, squares.within / squares.within_dof
    # docs/statistics.md, eq. 24.
    correlation = (between - within) / (between + (squares.block_size - 1) * within)
    # docs/statistics.md, eq. 25.
    p = float(stats.f.sf(between / within, squares.between_dof, squares.within_dof))
    test = f"correlation of submissions under the same seed {correlation:.2f}, p {p:.2g}"
    if p > PAIRING_LEVEL:
        return Pairing(0.0, dof, 1.0, f"pairs not paired by seed, for that was not shown to help ({test})")
    # docs/statistics.md, eq. 26.
    effective_dof = (squares.between + squares.within) ** 2 / (
        squares.between**2 / squares.between_dof + squares.within**2 / squares.within_dof
    )
    efficiency = effective_dof / (squares.between_dof + squares.within_dof)
    return Pairing(correlation, float(squares.within_dof), efficiency, f"pairs paired by seed, for that helps ({test})")
