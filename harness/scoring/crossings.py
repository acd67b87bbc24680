"""Where trials first met their target, and how far each went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.records.evaluations import Array, Evaluations

_AT_TARGET = ("index", "seconds", "steps", "examples", "resolution_seconds", "resolution_steps", "crossing_share")
_OF_TRIAL = (
    "limit_seconds", "limit_steps", "best", "final", "peak_memory_bytes", "data_wait_share", "build_seconds",
    "compile_seconds",
)  # fmt: skip


@dataclass
class Crossings:
    """Of each trial; all but the last are arrays float [trials], NaN where there is nothing to tell."""

    index: Array
    """Of the first evaluation that met the target, from 0; the next six are of the same evaluation."""
    seconds: Array
    steps: Array
    examples: Array
    """Of all gradients so far."""
    resolution_seconds: Array
    """Since the evaluation before: how exactly the crossing is known."""
    resolution_steps: Array
    crossing_share: Array
    """Where between the evaluation before, 0, and this one, 1, the interpolated metric meets the target: in (0, 1]
    (docs/statistics.md, eq. 8a). NaN where no evaluation before has a value."""
    limit_seconds: Array
    """How far the trial went."""
    limit_steps: Array
    best: Array
    """Value of the metric."""
    final: Array
    peak_memory_bytes: Array
    data_wait_share: Array
    """Of the seconds."""
    build_seconds: Array
    compile_seconds: Array
    non_monotonic: NDArray[np.bool_]
    """Its time or its steps decrease somewhere."""

    def columns(self, met: NDArray[np.bool_]) -> dict[str, Array]:
        """As columns of a table. met: bool [trials], which crossings count; the others become NaN."""
        at_target = {name: np.where(met, getattr(self, name), np.nan) for name in _AT_TARGET}
        return at_target | {name: getattr(self, name) for name in _OF_TRIAL}


def find_crossings(rows: Evaluations, target: Array, minimise: NDArray[np.bool_]) -> Crossings:
    """Where each trial first met its target, and how far it went.

    target, minimise: [trials], by the trial numbers in `rows`. A trial without rows has NaN everywhere.
    """
    count = len(target)
    crossings = Crossings(
        **{name: np.full(count, np.nan) for name in (*_AT_TARGET, *_OF_TRIAL)},
        non_monotonic=np.zeros(count, dtype=bool),
    )
    if not len(rows.trial):
        return crossings
    trials, start = np.unique(rows.trial, return_index=True)
    # In this sign smaller values of the metric are better.
    sign = np.where(minimise, 1.0, -1.0)[rows.trial]
    # A loss of minus infinity is a failure, and must not meet the target.
    value = np.where(np.isfinite(rows.value), rows.value, np.nan)
    with np.errstate(invalid="ignore"):
        meeting_rows = np.flatnonzero(value * sign <= target[rows.trial] * sign)
    crossed, first = np.unique(rows.trial[meeting_rows], return_index=True)
    crossing_row = meeting_rows[first]
    first_row = start[np.searchsorted(trials, crossed)]
    crossings.index[crossed] = crossing_row - first_row
    crossings.examples[crossed] = rows.further["examples"][crossing_row]
    signed_target = target[crossed] * sign[crossing_row]
    crossings.crossing_share[crossed] = _crossing_share(value * sign, signed_target, first_row, crossing_row)

    # The evaluation before a crossing is the last one with a time; an unusable row is stepped over.
    last_usable = np.maximum.accumulate(np.where(np.isnan(rows.seconds), -1, np.arange(len(rows.trial))))
    before = last_usable[np.maximum(crossing_row - 1, 0)]
    has_before = (crossing_row > first_row) & (before >= first_row)
    clocks = (
        (rows.seconds, crossings.seconds, crossings.resolution_seconds, crossings.limit_seconds),
        (rows.steps, crossings.steps, crossings.resolution_steps, crossings.limit_steps),
    )
    for clock, at_target, resolution, limit in clocks:
        at_target[crossed] = clock[crossing_row]
        # A first evaluation that meets the target is known only to lie between the start of the trial and itself.
        resolution[crossed] = clock[crossing_row] - np.where(has_before, clock[before], 0.0)
        # The largest and not the last, which can be an unusable row. The trials' rows are adjacent, so `reduceat` needs
        # only their starts.
        limit[trials] = np.fmax.reduceat(clock, start)
        known = np.flatnonzero(~np.isnan(clock))
        decreases = (np.diff(clock[known]) < 0) & (rows.trial[known][1:] == rows.trial[known][:-1])
        crossings.non_monotonic[rows.trial[known[1:][decreases]]] = True

    crossings.best[trials] = np.fmin.reduceat(value * sign, start) * sign[start]
    last_row = np.append(start[1:], len(rows.trial)) - 1
    # Of a trial without any usable row the last one, whose value is NaN.
    last_row = np.where(last_usable[last_row] >= start, last_usable[last_row], last_row)
    crossings.final[trials] = value[last_row]
    crossings.peak_memory_bytes[trials] = np.fmax.reduceat(rows.further["peak_memory_bytes"], start)
    with np.errstate(invalid="ignore", divide="ignore"):
        crossings.data_wait_share[trials] = rows.further["data_wait"][last_row] / rows.seconds[last_row]
    crossings.build_seconds[trials] = rows.further["build"][last_row]
    crossings.compile_seconds[trials] = rows.further["compile"][last_row]
    return crossings


def _crossing_share(value: Array, target: Array, first_row: NDArray[np.int_], crossing_row: NDArray[np.int_]) -> Array:
    """`Crossings.crossing_share` of the trials that met their target: [crossings].

    value: [rows], smaller is better; target, first_row, crossing_row: [crossings].
    """
    share = np.full(len(crossing_row), np.nan)
    for i, (first, row) in enumerate(zip(first_row.tolist(), crossing_row.tolist(), strict=True)):
        former = value[first:row]
        known = former[~np.isnan(former)]
        if len(known):
            # The best value so far, and not the last one: noise that raised the last evaluation must not move the
            # crossing towards the next. It is above the target, which no evaluation before has met.
            best = known.min()
            share[i] = (best - target[i]) / (best - value[row])
    return share
