"""The times of a board's studies as arrays, which is what the models of their noise start from.

A cell is a pair (submission, workload). It has one time per study; a study that met its target is a hit, any other is
a miss. Arrays are float [submissions, workloads, studies] = [S, W, K] or [S, W]. Entries without a study are NaN.
Derivations: docs/statistics.md, sections 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class StudyTable:
    """Log times of all studies. The unit of time cancels in everything that is made of them."""

    submissions: list[str]
    workloads: list[str]
    log_time: Array
    """Of hits, otherwise NaN: [S, W, K]."""
    log_limit: Array
    """How long a miss trained; NaN for hits, which may have stopped at the target: [S, W, K]."""
    log_horizon: Array
    """The longest that the cell's studies trained or could have trained: [S, W]. Infinite where all of them met the
    target and no budget is known. A median beyond it counts as a miss (docs/statistics.md, eq. 7)."""
    resolution: Array
    """(time - time of the evaluation before) / time of hits, in [0, 1); 0 where unknown: [S, W, K]."""
    timing_error: Array
    """Relative error of the seconds per step that all studies of the cell were timed by, and which therefore no number
    of studies makes smaller; 0 for times that were not made with a timing run: [S, W]."""
    timing_dof: float
    """Degrees of freedom of each of these errors."""
    draw_order: Index
    """Which row of random numbers a submission gets, by its times: int [S]. No name can change a result."""
    is_interpolated: Mask = field(default_factory=lambda: np.zeros((1, 1, 1), dtype=bool))
    """Hits whose time is the interpolated crossing, and not that of the evaluation: bool [S, W, K]."""

    @cached_property
    def is_hit(self) -> Mask:
        """Studies that met their target: bool [S, W, K]."""
        return np.isfinite(self.log_time)

    @cached_property
    def is_miss(self) -> Mask:
        """Studies that did not: bool [S, W, K]. An entry without a study is neither hit nor miss."""
        return np.isfinite(self.log_limit)

    @cached_property
    def hit_count(self) -> Array:
        """Studies of each cell that met the target: [S, W]."""
        return self.is_hit.sum(axis=-1).astype(float)

    @cached_property
    def miss_count(self) -> NDArray[np.int_]:
        """Studies of each cell that missed the target: int [S, W]."""
        return np.asarray(self.is_miss.sum(axis=-1))

    @cached_property
    def study_count(self) -> Array:
        """Hits and misses of each cell: [S, W]."""
        return self.hit_count + self.miss_count

    @cached_property
    def median_missed(self) -> Mask:
        """Where the median over studies is infinite: bool [S, W]."""
        # Half is enough: the median of an even number is the mean of a finite and an infinite time.
        return (self.study_count > 0) & (2 * self.hit_count <= self.study_count)

    @cached_property
    def mean_log_time(self) -> Array:
        """Mean over the hits of a cell, NaN without any: [S, W]."""
        total = np.where(self.is_hit, self.log_time, 0.0).sum(axis=-1)
        return np.where(self.hit_count > 0, total / np.maximum(self.hit_count, 1), np.nan)

    @cached_property
    def residuals(self) -> Array:
        """Log times of hits minus their cell's mean, 0 elsewhere: [S, W, K]."""
        return np.where(self.is_hit, self.log_time - self.mean_log_time[..., None], 0.0)

    @cached_property
    def log_resolution(self) -> Array:
        """How much earlier, in log time, the target can have been met than at the evaluations that the times are of:
        mean over hits, 0 without: [S, W] (eq. 9)."""
        widths = np.where(self.is_hit & ~self.is_interpolated, -np.log1p(-self.resolution), 0.0)
        return widths.sum(axis=-1) / np.maximum(self.hit_count, 1)

    @cached_property
    def crossing_error(self) -> Array:
        """Standard deviation of the error that interpolation leaves in the log times of a cell, and which its studies
        share; 0 for times of evaluations: [S, W] (eq. 9a)."""
        squares = np.where(self.is_hit & self.is_interpolated, self.resolution**2 / 12, 0.0)
        return np.sqrt(squares.sum(axis=-1) / np.maximum(self.hit_count, 1))

    @cached_property
    def shared_error(self) -> Array:
        """Standard deviation of the errors of log time that the studies of a cell share: of the timing run and of
        interpolation: [S, W]."""
        return np.sqrt(self.timing_error**2 + self.crossing_error**2)

    @cached_property
    def shared_dof(self) -> Array:
        """Degrees of freedom of `shared_error`, infinite where interpolation alone makes it: [S, W] (eq. 9b)."""
        is_timed = self.timing_error > 0
        relative = np.where(is_timed, self.shared_error / np.where(is_timed, self.timing_error, 1.0), 1.0)
        return np.where(is_timed, self.timing_dof * relative**4, np.inf)

    @cached_property
    def log_bound(self) -> Array:
        """Log of the median over studies of the time, or for a miss of how long it trained: [S, W]. The median is at
        least that; NaN without studies (eq. 7a)."""
        known = np.exp(np.where(self.is_hit, self.log_time, np.where(self.is_miss, self.log_limit, np.nan)))
        bound = np.full(known.shape[:2], np.nan)
        has_study = self.study_count > 0
        bound[has_study] = np.log(np.nanmedian(known[has_study], axis=-1))
        return bound

    @cached_property
    def resolution_sd(self) -> float:
        """Standard deviation that the spacing of evaluations implies by itself, over all hits (eq. 12)."""
        return uniform_sd(self.resolution[self.is_hit])


def uniform_sd(widths: Array) -> float:
    """Root mean square of the standard deviations of uniform distributions of these widths; 0 without any."""
    return float(np.sqrt((widths**2).mean() / 12)) if widths.size else 0.0


def tabulate(studies: pd.DataFrame) -> StudyTable:
    """The rows that `uncertainty.estimate` takes, one per study, as arrays with submissions and workloads by name."""
    submissions, s = np.unique(studies["submission"].to_numpy(dtype=str), return_inverse=True)
    workloads, w = np.unique(studies["workload"].to_numpy(dtype=str), return_inverse=True)
    numbers, k = np.unique(studies["study"].to_numpy(), return_inverse=True)
    time, limit, resolution = (studies[column].to_numpy(dtype=float) for column in ("time", "limit", "resolution"))
    budget = studies["budget"].to_numpy(dtype=float) if "budget" in studies else np.full(len(studies), np.nan)
    is_hit = np.isfinite(time)
    shape = (len(submissions), len(workloads), len(numbers))
    limit = _fill_limits(time, limit, w, len(workloads))

    log_time, log_limit, relative = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape)
    is_interpolated = np.zeros(shape, dtype=bool)
    if "interpolated" in studies:
        is_interpolated[s, w, k] = studies["interpolated"].to_numpy(dtype=bool) & is_hit
    log_time[s[is_hit], w[is_hit], k[is_hit]] = np.log(time[is_hit])
    log_limit[s[~is_hit], w[~is_hit], k[~is_hit]] = np.log(limit[~is_hit])
    with np.errstate(invalid="ignore"):
        # docs/statistics.md, eq. 8. A resolution of the whole time would put the crossing at time zero, where the
        # logarithm ends.
        relative[s, w, k] = np.where(is_hit & (resolution > 0), np.minimum(resolution / time, 1 - 1e-9), 0.0)
    return StudyTable(
        submissions=list(submissions),
        workloads=list(workloads),
        log_time=log_time,
        log_limit=log_limit,
        log_horizon=_log_horizon(time, limit, budget, (s, w), shape[:2]),
        resolution=relative,
        timing_error=_timing_error(studies, (s, w), shape[:2]),
        timing_dof=float(studies["timing_dof"].min()) if "timing_dof" in studies and len(studies) else 1.0,
        draw_order=_order_by_times(log_time, log_limit),
        is_interpolated=is_interpolated,
    )


def _timing_error(studies: pd.DataFrame, cell: tuple[Index, Index], shape: tuple[int, int]) -> Array:
    """[S, W], the mean over the studies. cell: the row's submission and workload."""
    total, number = np.zeros(shape), np.zeros(shape)
    if "timing_error" in studies:
        np.add.at(total, cell, studies["timing_error"].to_numpy(dtype=float))
        np.add.at(number, cell, 1.0)
    return total / np.maximum(number, 1.0)


def _fill_limits(time: Array, limit: Array, workload: Index, workloads: int) -> Array:
    """The limits [rows]. A miss of unknown length is taken to have trained as long as any study of its workload."""
    known = np.where(np.isfinite(time), time, np.where(np.isfinite(limit), limit, -np.inf))
    longest = np.full(workloads, -np.inf)
    np.maximum.at(longest, workload, known)
    # Where a workload has no known length at all, any number will do: nobody met its target.
    fallback = np.where(np.isfinite(longest[workload]), longest[workload], 1.0)
    return np.where(np.isfinite(limit), limit, fallback)


def _log_horizon(time: Array, limit: Array, budget: Array, cell: tuple[Index, Index], shape: tuple[int, int]) -> Array:
    """[S, W] (docs/statistics.md, eq. 7). time, limit, budget: [rows]; cell: the row's submission and workload."""
    is_hit = np.isfinite(time)
    has_miss = np.zeros(shape, dtype=bool)
    has_miss[cell[0][~is_hit], cell[1][~is_hit]] = True
    # Misses show how long the cell's studies could train; a budget is a guess at that and only read without misses.
    could_train = np.where(has_miss[cell], time, np.where(np.isfinite(budget), np.maximum(budget, time), -np.inf))
    longest = np.full(shape, -np.inf)
    np.maximum.at(longest, cell, np.where(is_hit, could_train, limit))
    with np.errstate(divide="ignore"):
        # -inf, without any known length, becomes an infinite horizon.
        return np.where(longest > 0, np.log(np.maximum(longest, 0.0)), np.inf)


def _order_by_times(log_time: Array, log_limit: Array) -> Index:
    """The rank of each submission when sorted by its times, then limits: int [S]."""
    submissions = len(log_time)
    order = np.empty(submissions, dtype=np.intp)
    if submissions:
        # lexsort takes its last key as the first one, hence the reversal.
        keys = np.concatenate([times.reshape(submissions, -1) for times in (log_time, log_limit)], axis=1)
        order[np.lexsort(np.nan_to_num(keys, nan=np.inf).T[::-1])] = np.arange(submissions)
    return order
