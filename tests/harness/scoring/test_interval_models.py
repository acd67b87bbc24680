"""Single equations of docs/statistics.md against direct computation: integrals, moments and biases."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from harness.scoring.interval_models import (
    CensoredCells,
    HitVariation,
    MedianModel,
    censored_cells,
    hit_variation,
    sigma_grid,
    sigma_posterior,
    t_model,
)
from harness.scoring.pooled_noise import Pairing
from harness.scoring.score_intervals import debiased_minimum, softmin_best
from harness.scoring.study_table import StudyTable

ROOT = Path(__file__).parents[3]


def table_of(log_times: np.ndarray, log_limits: np.ndarray) -> StudyTable:
    """log_times [submissions, workloads, studies] as hits where they are below log_limits, else misses at these."""
    is_hit = log_times <= log_limits
    return StudyTable(
        submissions=[f"s{i}" for i in range(log_times.shape[0])],
        workloads=[f"w{i}" for i in range(log_times.shape[1])],
        log_time=np.where(is_hit, log_times, np.nan),
        log_limit=np.where(is_hit, np.nan, log_limits),
        log_horizon=np.full(log_times.shape[:2], np.inf),
        resolution=np.zeros(log_times.shape),
        timing_error=np.zeros(log_times.shape[:2]),
        timing_dof=1.0,
        draw_order=np.arange(log_times.shape[0]),
    )


def censored_table() -> StudyTable:
    """One cell with three hits and misses at two limits, one cell with hits alone."""
    log_times = np.array([[[1.0, 1.1, 0.9, 5.0, 5.0], [1.0, 1.2, 0.7, 1.1, 0.9]]])
    return table_of(log_times, np.array([2.0, 2.0, 2.0, 1.15, 1.3]))


# ---- integrals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [5, 24, 40])
def test_a_censored_cell_is_integrated_correctly(g: int) -> None:
    """Equations 15, 16 and 19 by adaptive quadrature, at three values of sigma."""
    table = censored_table()
    cells = censored_cells(table, sigma_grid(hit_variation(table, 1.0)))
    assert (cells.submission.tolist(), cells.workload.tolist()) == ([0], [0])
    sigma, n, mean = cells.sigmas[g], 3, 1.0

    def density(mu: float) -> float:
        hits = np.exp(-n * (mu - mean) ** 2 / (2 * sigma**2))
        return float(hits * stats.norm.cdf((mu - 1.15) / sigma) * stats.norm.cdf((mu - 1.3) / sigma))

    def moment(power: int, upper: float = 20 * sigma) -> float:
        return float(
            integrate.quad(lambda mu: mu**power * density(mu), -20 * sigma, upper, limit=500, points=[mean])[0]
        )

    total = moment(0)
    assert cells.log_evidence[0, g] == pytest.approx(np.log(np.sqrt(n) / sigma * total), abs=1e-4)
    expected = moment(1) / total
    means, variances = cells.moments()
    assert means[0, g] == pytest.approx(expected, abs=1e-3 * sigma)
    assert variances[0, g] == pytest.approx(moment(2) / total - expected**2, rel=1e-2)
    for point in (30, 64, 90):
        share = moment(0, float(cells.points[0, g, point])) / total
        assert cells.cumulative[0, g, point] == pytest.approx(share, abs=1e-3)


def test_without_misses_sigma_has_the_scaled_inverse_chi_square() -> None:
    """Equation 13, and equation 18 for the grid that is used where there are misses."""
    hits = HitVariation(sum_of_squares=0.3, dof=9.0)
    empty = np.empty(0, dtype=np.intp)
    sigmas = sigma_grid(hits)
    none = CensoredCells(empty, empty, sigmas, np.empty((0, 48, 128)), np.empty((0, 48, 128)), np.empty((0, 48)))
    exact = sigma_posterior(hits, none, 4000)
    assert (exact.dof, exact.sigma) == (9.0, pytest.approx(np.sqrt(0.3 / 9)))
    # One cell whose misses say nothing: evidence 1 for every sigma.
    index = np.array([0])
    uninformative = CensoredCells(
        index, index, sigmas, np.empty((1, 48, 128)), np.empty((1, 48, 128)), np.zeros((1, 48))
    )
    on_grid = sigma_posterior(hits, uninformative, 4000)
    assert on_grid.sigma == pytest.approx(exact.sigma, rel=1e-3) and on_grid.dof == pytest.approx(9, rel=1e-2)
    middle = slice(100, -100)
    np.testing.assert_allclose(on_grid.draws[middle], exact.draws[middle], rtol=1e-2)
    np.testing.assert_allclose(stats.chi2.cdf(0.3 / exact.draws**2, 9), 1 - (np.arange(4000) + 0.5) / 4000, atol=1e-9)


@pytest.mark.parametrize("misses", [1, 3, 6])
def test_a_never_met_cell_is_bounded_by_the_chance_that_all_miss(misses: int) -> None:
    """Equation 20: at the lower end of the interval all studies miss with a probability of 2.5%, if they can.

    Sigma is known well. At the horizon six studies all miss with a probability of 1.6% only.
    """
    log_times = np.random.default_rng(0).normal(0.0, 0.1, (1, 200, 6))
    log_times[0, 0] = 9.0
    log_limits = np.full(log_times.shape, 8.0)
    table = table_of(log_times, log_limits)
    table.log_limit[0, 0, misses:] = np.nan
    table = replace(table, log_horizon=np.where(table.miss_count > 0, 8.0, np.inf))
    unpaired = Pairing(0.0, np.nan, 1.0, "")
    model, posterior = t_model(table, unpaired, 0.95, np.random.default_rng(0), draws=20_000)
    chance_of_miss = stats.norm.cdf((model.low[0, 0] - 8.0) / posterior.sigma)
    assert chance_of_miss**misses == pytest.approx(min(0.025, 0.5**misses), rel=0.1)
    assert np.isinf(model.high[0, 0]) and np.isinf(model.latent_draws[:, 0, 0]).all()


# ---- the best time of a score's interval ---------------------------------------------------------------------------


def draws_of(log_medians: np.ndarray, sd: float, tables: int, draws: int) -> list[MedianModel]:
    """Models of one workload [submissions, 1], whose estimates scatter by sd around the truth, their draws again."""
    rng = np.random.default_rng(0)
    shape = (len(log_medians), 1)
    models = []
    for _ in range(tables):
        estimate = log_medians[:, None] + sd * rng.standard_normal(shape)
        drawn = estimate + sd * rng.standard_normal((draws, *shape))
        models.append(
            MedianModel(
                estimate=estimate,
                variance=np.full(shape, sd**2),
                covariance=np.zeros((len(shape), *shape)),
                bound=estimate,
                bound_variance=np.full(shape, sd**2),
                timing_variance=np.zeros(shape),
                timing_dof=1.0,
                timing_noise=np.zeros_like(drawn),
                dof=np.full(shape, np.inf),
                has_shared_dof=True,
                draws=drawn,
                latent_draws=drawn,
                low=estimate,
                high=estimate,
                correlation=0.0,
            )
        )
    return models


@pytest.mark.parametrize("gaps", [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 3, 3), (0, 9, 9, 9)])
def test_the_best_time_of_the_upper_end_is_never_too_small(gaps: tuple[float, ...]) -> None:
    """Equation 39. gaps: from the best submission, in standard errors. The minimum of the draws is too small.

    The mean is known to about 0.03 standard errors.
    """
    sd = 0.1
    models = draws_of(sd * np.array(gaps, dtype=float), sd, tables=1000, draws=20)
    upper = np.mean([softmin_best(model).mean() for model in models]) / sd
    assert upper >= -0.1
    if gaps in ((0, 0, 0, 0), (0, 9, 9, 9)):
        assert upper <= 0.1
    if gaps == (0, 0, 0, 0):
        smallest = np.mean([model.draws.min(axis=1).mean() for model in models]) / sd
        assert smallest < -1.3


@pytest.mark.parametrize("gaps", [(0, 0, 0, 0), (0, 1, 2, 3), (0, 9, 9, 9)])
def test_the_best_time_of_the_lower_end_has_the_bias_of_the_estimates_alone(gaps: tuple[float, ...]) -> None:
    """Equation 40. A table's 500 draws know the bias that they add to 0.04 standard errors."""
    sd = 0.1
    models = draws_of(sd * np.array(gaps, dtype=float), sd, tables=200, draws=500)
    lower = np.mean([debiased_minimum(model).mean() for model in models]) / sd
    smallest_estimate = np.mean([model.estimate.min() for model in models]) / sd
    assert smallest_estimate - 0.01 <= lower <= smallest_estimate + 0.04


# ---- the document --------------------------------------------------------------------------------------------------


def test_the_document_has_every_equation_and_test_that_is_cited() -> None:
    text = (ROOT / "docs" / "statistics.md").read_text()
    tags = [int(tag) for tag in re.findall(r"\\tag\{(\d+)\}", text)]
    assert tags == list(range(1, len(tags) + 1))
    cited = set()
    for path in (ROOT / "harness" / "scoring").glob("*.py"):
        for numbers in re.findall(r"\beq\. ([\d, ]+(?:(?:and|to) \d+)?)", path.read_text()):
            cited |= {int(number) for number in re.findall(r"\d+", numbers)}
    assert cited and cited <= set(tags)
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20 and [name for name in sorted(named) if f"def {name}(" not in tests] == []
