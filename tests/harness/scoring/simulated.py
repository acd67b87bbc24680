"""Leaderboards with a known truth: tables of log medians, and studies that scatter around them."""

from __future__ import annotations

import numpy as np
import pandas as pd

SIGMA = 0.06
BUDGET = 10.0
LIMIT = np.log(BUDGET)
NEAR = LIMIT - 0.84 * SIGMA
"""A log median with which a study misses with probability 0.2."""
NEVER = LIMIT + 20 * SIGMA

# Log medians [submissions, workloads]. MIXED: no two alike; the first and third are near the budget on the last
# workload, the last never meets the third target.
MIXED = np.log([3.0, 4.0, 2.5, 0.75 * BUDGET]) + np.array([0.0, 0.0, 0.04, 0.2])[:, None]
MIXED[3] += [0.0, 0.3, 0.0, -0.3]
MIXED[[0, 2], 3] = NEAR
MIXED[3, 2] = NEVER
# EQUAL: no difference between any; one workload near the budget, one that nobody meets. TIED: the same without these.
EQUAL = np.tile(np.append(np.log([3.0, 4.0, 2.5]), [NEAR, NEVER]), (8, 1))
TIED = EQUAL[:4, :3]
# SEPARATED: the first is clearly best everywhere.
SEPARATED = np.log([3.0, 4.0, 2.5]) + np.array([0.0, 0.2, 0.35])[:, None]
# JUST_MISSED: the same, with a fourth workload, but the second misses three targets by a tenth of sigma.
JUST_MISSED = np.log([3.0, 4.0, 2.5, 5.0]) + np.array([0.0, 0.2, 0.35])[:, None]
JUST_MISSED[1, 1:] = LIMIT + 0.1 * SIGMA
# CROWDED: many misses everywhere: 20%, 30% and 40% of the studies.
CROWDED = LIMIT - SIGMA * np.tile([0.84, 0.52, 0.25], (3, 1))


def studies_table(log_times: np.ndarray, *, resolution: float = 0.0) -> pd.DataFrame:
    """Log times [submissions, workloads, studies] as the table that `estimate` reads; missed beyond BUDGET."""
    submission, workload, study = (index.ravel() for index in np.indices(log_times.shape))
    times = np.exp(log_times).ravel()
    is_hit = times <= BUDGET
    return pd.DataFrame(
        {
            "submission": np.array([f"s{i}" for i in range(log_times.shape[0])])[submission],
            "workload": np.array([f"w{i}" for i in range(log_times.shape[1])])[workload],
            "study": study,
            "time": np.where(is_hit, times, np.inf),
            # Training stops at the target.
            "limit": np.where(is_hit, times, BUDGET),
            "resolution": np.where(is_hit, resolution * times, np.nan),
            "budget": BUDGET,
        }
    )


def noisy(log_medians: np.ndarray, studies: int, seed: int = 0) -> np.ndarray:
    """Log times [submissions, workloads, studies] around log medians [submissions, workloads]."""
    noise = np.random.default_rng(seed).standard_normal((*log_medians.shape, studies))
    return log_medians[..., None] + SIGMA * noise
