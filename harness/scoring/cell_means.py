"""Mean log times of the cells without misses, by which tables of ten studies or more are compared.

Derivation: docs/statistics.md, section 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.scoring.study_table import Array, StudyTable


@dataclass(frozen=True)
class CellMeans:
    """Mean log times of cells without misses, each with a variance of its own (docs/statistics.md, eq. 30b)."""

    estimate: Array
    """[S, W]; NaN for a cell with misses or without studies, as are the others."""
    variance: Array
    """Squared standard error, `timing_variance` included: [S, W]."""
    covariance: Array
    """Of two submissions on a workload: [S, S, W]; 0 unless paired by seed."""


def cell_means(table: StudyTable, correlation: float) -> CellMeans:
    """The mean log times of cells without misses (docs/statistics.md, eq. 30b).

    A mean of ten or more studies is close to normal whatever its studies are, and has two thirds of the variance of
    their median.
    """
    number = table.hit_count
    is_complete = (number > 1) & (table.miss_count == 0)
    squares = (table.residuals**2).sum(axis=-1) / np.maximum(number - 1, 1)
    # As in eq. 12: crossings at the same evaluation show no spread.
    widths = np.where(table.is_hit, table.resolution**2, 0.0).sum(axis=-1) / np.maximum(number, 1)
    squares = np.maximum(squares, widths / 12) + 1e-24
    variance = np.where(is_complete, squares / np.maximum(number, 1) + table.shared_error**2, np.nan)
    is_hit = table.is_hit.astype(float)
    common = np.einsum("awk,bwk->abw", is_hit, is_hit) / np.maximum(number[:, None] * number[None], 1)
    covariance = correlation * np.sqrt(squares[:, None] * squares[None]) * common
    return CellMeans(np.where(is_complete, table.mean_log_time, np.nan), variance, covariance)
