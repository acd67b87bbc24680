"""Two models of the median log time of every cell, from the few studies that a board has of it.

- `t_model`, below ten studies. Log times are normal around their cell's median, with one standard deviation for the
  whole table, and a miss is censored at the time that it trained (Tobin 1958). The prior is flat in the medians and
  1 / sigma in sigma. Without misses every interval is then exactly the t interval with pooled variance.
- `bootstrap`, from ten studies on: medians of resampled studies, each cell with its own spread. It is smoothed
  (Silverman & Young 1987), since the resampled medians of ten studies take at most ten values.

Intervals of scores, speed-ups and comparisons are made of either by harness/scoring/uncertainty.py. Derivations:
docs/statistics.md, sections 3, 4, 5 and 9. Shapes: S submissions, W workloads, D draws, C censored cells, G values of
sigma, P values of a median.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from harness.scoring.cell_means import CellMeans, cell_means
from harness.scoring.pooled_noise import Pairing
from harness.scoring.study_table import Array, Index, Mask, StudyTable, uniform_sd

DRAWS = 2000
"""Draws of the log medians, unless the caller asks for another number; 50 lie beyond each end of a 95% interval."""
SIGMA_POINTS = 48
"""G, the grid on which the posterior of sigma is integrated where cells are censored."""
MEDIAN_POINTS = 128
"""P, the grid on which the posterior of a censored cell's median is integrated."""
SMOOTHING = 0.5
"""Standard deviation of the bootstrap's noise, in units of s * n**(-1/5) (docs/statistics.md, eq. 43)."""


@dataclass(frozen=True)
class MedianModel:
    """What a model states about the log medians. Arrays [S, W] unless noted; NaN where a cell has no study."""

    estimate: Array
    variance: Array
    """Squared standard error of `estimate`, `timing_variance` included."""
    timing_variance: Array
    """The part of it that studies do not make smaller: that of the timing run and of interpolated crossings."""
    timing_dof: Array | float
    """Degrees of freedom of `timing_variance`."""
    covariance: Array
    """Of the estimates of two submissions on a workload: [S, S, W]; 0 unless paired by seed."""
    bound: Array
    """Log time that the median of a missed cell is at least, up to an error of variance `bound_variance`; elsewhere the
    estimate, at most the horizon."""
    bound_variance: Array
    dof: Array
    """Degrees of freedom of each variance without `timing_variance`."""
    has_shared_dof: bool
    """Whether these are multiples of one estimate, so that their sums have its degrees of freedom."""
    draws: Array
    """Joint draws of the log medians, infinite beyond the cell's horizon: [D, S, W]."""
    latent_draws: Array
    """The same draws with the times beyond the horizon; infinite only where no study met the target: [D, S, W]."""
    timing_noise: Array
    """The part of these draws that a cell's studies share. It moves its times and its horizon alike: [D, S, W]."""
    low: Array
    high: Array
    """Ends of the interval of the log median; `high` is infinite where misses leave it open."""
    correlation: float
    """Of the noise of two submissions under the same seed; 0 unless paired."""
    means: CellMeans | None = None
    """What cells without misses are compared by, in place of the above; None: by the above."""


# ---- the t model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HitVariation:
    """What the hits alone state about sigma: sigma**2 is distributed as sum_of_squares / chi2(dof)."""

    sum_of_squares: float
    dof: float


@dataclass(frozen=True)
class CensoredCells:
    """Posterior of the median of each of the C cells with hits and misses, for each of G values of sigma."""

    submission: Index
    workload: Index
    """Where the cells are in the table: int [C]."""
    sigmas: Array
    """[G], ascending."""
    points: Array
    """Log medians at which the distribution is known, ascending: [C, G, P]."""
    cumulative: Array
    """Probability that the log median is at most the point: [C, G, P]."""
    log_evidence: Array
    """Log probability of the cell's misses given its hits: [C, G] (docs/statistics.md, eq. 16)."""

    def moments(self) -> tuple[Array, Array]:
        """Mean and variance of the log medians given sigma: both [C, G]."""
        probability = np.diff(self.cumulative, axis=-1)
        middle = (self.points[..., 1:] + self.points[..., :-1]) / 2
        mean = (probability * middle).sum(axis=-1)
        return mean, (probability * (middle - mean[..., None]) ** 2).sum(axis=-1)

    def draw(self, sigma_draws: Array, uniform: Array) -> Array:
        """Log medians [D, C] at the probabilities `uniform` [D, C], each at the grid's sigma nearest to its own."""
        nearest = np.abs(np.log(sigma_draws)[:, None] - np.log(self.sigmas)).argmin(axis=1)
        log_medians = np.empty_like(uniform)
        for g in np.unique(nearest):
            rows = np.nonzero(nearest == g)[0]
            for c in range(len(self.submission)):
                log_medians[rows, c] = np.interp(uniform[rows, c], self.cumulative[c, g], self.points[c, g])
        return log_medians


@dataclass(frozen=True)
class SigmaPosterior:
    """Posterior of the standard deviation of log time."""

    sigma: float
    dof: float
    """Those of the scaled inverse chi-square with the posterior's mean and variance of 1 / sigma**2."""
    draws: Array
    """Its D equally likely quantiles, ascending. Being no random numbers, they add no noise to the intervals."""
    weights: Array
    """Probability of each of `CensoredCells.sigmas`: [G]; empty where no cell is censored."""


def t_model(
    table: StudyTable, pairing: Pairing, level: float, rng: np.random.Generator, draws: int = DRAWS
) -> tuple[MedianModel, SigmaPosterior]:
    """The t model of a table of studies, with intervals at `level`, and its posterior of sigma."""
    hits = hit_variation(table, pairing.efficiency)
    cells = censored_cells(table, sigma_grid(hits))
    posterior = sigma_posterior(hits, cells, draws)
    estimate, variance = cell_moments(table, cells, posterior)
    log_medians = joint_draws(table, cells, posterior, pairing.correlation, rng)
    noise = timing_noise(table, draws, rng)
    timing_variance = table.shared_error**2
    low, high = _intervals(table, estimate, variance, posterior.dof, log_medians, noise, level)

    # Only studies that both submissions solved contribute common noise to their two means.
    is_hit = table.is_hit.astype(float)
    size = np.maximum(table.hit_count, 1)
    # docs/statistics.md, eq. 27.
    common_share = np.einsum("awk,bwk->abw", is_hit, is_hit) / (size[:, None] * size[None])
    model = MedianModel(
        estimate=estimate,
        variance=variance + timing_variance,
        timing_variance=timing_variance,
        timing_dof=table.shared_dof,
        covariance=pairing.correlation * posterior.sigma**2 * common_share,
        bound=np.where(table.median_missed, table.log_bound, np.minimum(estimate, table.log_horizon)),
        bound_variance=posterior.sigma**2 / np.maximum(table.study_count, 1) + timing_variance,
        dof=np.full(estimate.shape, pairing.dof if pairing.correlation else posterior.dof),
        has_shared_dof=True,
        draws=np.where(log_medians > table.log_horizon, np.inf, log_medians + noise),
        latent_draws=np.where(_never_met(table), np.inf, log_medians + noise),
        timing_noise=noise,
        low=low,
        high=high,
        correlation=pairing.correlation,
    )
    return model, posterior


def timing_noise(table: StudyTable, draws: int, rng: np.random.Generator) -> Array:
    """What the errors that studies share add to each draw of the log medians: [D, S, W] (docs/statistics.md, eq. 22a).
    0 for times that have none."""
    shape = (draws, *table.timing_error.shape)
    noise = np.zeros(shape)
    # No random number is drawn where there is no error, so that intervals in steps do not depend on whether there is.
    if table.timing_error.any():
        noise += rng.standard_t(table.timing_dof, shape)[:, table.draw_order] * table.timing_error
    if table.crossing_error.any():
        noise += rng.standard_normal(shape)[:, table.draw_order] * table.crossing_error
    return noise


def combined_dof(variance: Array, dof: Array | float, timing_variance: Array, timing_dof: Array | float) -> Array:
    """Degrees of freedom of the sum of a variance between studies and one that they share, by Welch and Satterthwaite
    (docs/statistics.md, eq. 30a); `dof` where the second is 0."""
    total = (variance + timing_variance) ** 2
    parts = variance**2 / dof + timing_variance**2 / timing_dof
    return np.where(timing_variance > 0, total / np.maximum(parts, 1e-300), dof)


def _never_met(table: StudyTable) -> Mask:
    return (table.hit_count == 0) & (table.miss_count > 0)


def hit_variation(table: StudyTable, efficiency: float) -> HitVariation:
    """Pooled squares of the hits (docs/statistics.md, eq. 11 and 12), worth `efficiency` of their number (eq. 26)."""
    dof = float(np.maximum(table.hit_count - 1, 0).sum())
    # Times that cross at the same evaluation show no spread, but the spacing of the evaluations hides one. Without
    # resolutions, equal times must not make sigma zero.
    floor = max(table.resolution_sd, 1e-12)
    sum_of_squares = max(float((table.residuals**2).sum()), dof * floor**2)
    return HitVariation(sum_of_squares * efficiency, dof * efficiency)


def sigma_grid(hits: HitVariation) -> Array:
    """Values of sigma that hold all but 1e-5 of its posterior at each end: [G], evenly spaced in log sigma."""
    quantiles = np.sqrt(hits.sum_of_squares / stats.chi2.ppf([1 - 1e-5, 1e-5], hits.dof))
    # Misses far beyond the hits make sigma larger than the hits alone do.
    low, high = quantiles * [1.0, 2.0]
    return np.geomspace(low, high, SIGMA_POINTS)


def censored_cells(table: StudyTable, sigmas: Array) -> CensoredCells:
    """Integrate the medians of the cells with hits and misses (docs/statistics.md, eq. 15 and 16)."""
    submission, workload = np.nonzero((table.hit_count > 0) & (table.miss_count > 0))
    mean = table.mean_log_time[submission, workload]
    is_miss = table.is_miss[submission, workload]
    limits = np.where(is_miss, table.log_limit[submission, workload], -np.inf)
    scale = sigmas / np.sqrt(table.hit_count[submission, workload])[:, None]

    # The density is the hits' normal times a factor that rises from 0 to 1 around the limits. Six standard errors below
    # the mean, and above the larger of mean and limits, it has fallen below 1e-5 of its peak.
    start = mean[:, None] - 6 * scale
    stop = np.maximum(mean, limits.max(axis=-1, initial=-np.inf))[:, None] + 6 * scale
    points = start[..., None] + (stop - start)[..., None] * np.linspace(0, 1, MEDIAN_POINTS)
    log_density = -0.5 * ((points - mean[:, None, None]) / scale[..., None]) ** 2
    for k in range(limits.shape[1]):
        cells = is_miss[:, k]
        log_density[cells] += special.log_ndtr((points[cells] - limits[cells, k, None, None]) / sigmas[:, None])

    # Relative to the peak, or every density of a cell whose misses lie far beyond its hits would underflow to zero.
    peak = log_density.max(axis=-1, keepdims=True)
    density = np.exp(log_density - peak)
    trapezoids = (density[..., 1:] + density[..., :-1]) / 2
    total = trapezoids.sum(axis=-1)
    cumulative = np.concatenate([np.zeros_like(total)[..., None], np.cumsum(trapezoids, axis=-1)], axis=-1)
    step = points[..., 1] - points[..., 0]
    # docs/statistics.md, eq. 16; `scale` is sigma / sqrt(n).
    log_evidence = np.log(total * step / scale) + peak[..., 0]
    return CensoredCells(submission, workload, sigmas, points, cumulative / total[..., None], log_evidence)


def sigma_posterior(hits: HitVariation, cells: CensoredCells, draws: int) -> SigmaPosterior:
    """Posterior of sigma from the hits and the evidence of the misses (docs/statistics.md, eq. 13, 17, 18)."""
    # docs/statistics.md, eq. 21.
    quantiles = (np.arange(draws) + 0.5) / draws
    if not len(cells.submission):
        sigma = float(np.sqrt(hits.sum_of_squares / hits.dof))
        # 1 - quantiles, so that these draws are in ascending order as those from the grid are.
        sigma_draws = np.sqrt(hits.sum_of_squares / stats.chi2.ppf(1 - quantiles, hits.dof))
        return SigmaPosterior(sigma, hits.dof, sigma_draws, np.empty(0))
    sigmas = cells.sigmas
    # docs/statistics.md, eq. 17. The grid is even in log sigma, so its points need no widths.
    log_density = -hits.dof * np.log(sigmas) - hits.sum_of_squares / (2 * sigmas**2)
    log_density = log_density + cells.log_evidence.sum(axis=0)
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    # docs/statistics.md, eq. 18.
    precision = (weights / sigmas**2).sum()
    dof = float(2 * precision**2 / (weights * (sigmas**-2 - precision) ** 2).sum())
    # A grid point stands in the middle of its weight.
    cumulative = np.cumsum(weights) - weights / 2
    sigma_draws = np.exp(np.interp(quantiles, cumulative, np.log(sigmas)))
    return SigmaPosterior(float(precision**-0.5), dof, sigma_draws, weights)


def cell_moments(table: StudyTable, cells: CensoredCells, posterior: SigmaPosterior) -> tuple[Array, Array]:
    """Estimate of each log median and its squared standard error: both [S, W] (docs/statistics.md, eq. 13, 19)."""
    estimate = table.mean_log_time.copy()
    variance = posterior.sigma**2 / np.maximum(table.hit_count, 1)
    if len(cells.submission):
        means, variances = cells.moments()
        # docs/statistics.md, eq. 19: the variance at one sigma, not averaged over sigma, whose uncertainty is in the
        # degrees of freedom already.
        nearest = int(np.abs(np.log(posterior.sigma) - np.log(cells.sigmas)).argmin())
        average = (means * posterior.weights).sum(axis=-1)
        between = (posterior.weights * (means - average[:, None]) ** 2).sum(axis=-1)
        estimate[cells.submission, cells.workload] = average
        variance[cells.submission, cells.workload] = variances[:, nearest] + between
    never = _never_met(table)
    estimate[never] = table.log_horizon[never]
    return estimate, variance


def joint_draws(
    table: StudyTable, cells: CensoredCells, posterior: SigmaPosterior, correlation: float, rng: np.random.Generator
) -> Array:
    """Draws of all log medians together, under a common sigma: [D, S, W] (docs/statistics.md, eq. 20 to 22)."""
    noise = _seed_noise(table, correlation, len(posterior.draws), rng)
    size = np.maximum(table.hit_count, 1)
    log_medians = table.mean_log_time + posterior.draws[:, None, None] * noise / np.sqrt(size)
    if len(cells.submission):
        # From the same noise as the other cells, so that the correlation of section 6 holds for censored cells too.
        uniform = special.ndtr(noise[:, cells.submission, cells.workload])
        log_medians[:, cells.submission, cells.workload] = cells.draw(posterior.draws, uniform)
    never = _never_met(table)
    # docs/statistics.md, eq. 20, solved for the median: all of m studies miss with probability Phi(...)**m.
    beyond = special.ndtri(special.ndtr(noise[:, never]) ** (1 / table.miss_count[never]))
    log_medians[:, never] = table.log_horizon[never] + posterior.draws[:, None] * beyond
    return log_medians


def _seed_noise(table: StudyTable, correlation: float, draws: int, rng: np.random.Generator) -> Array:
    """Standard normal [D, S, W], correlated between the submissions on a workload (docs/statistics.md, eq. 22)."""
    shape = (draws, len(table.submissions), len(table.workloads))
    # The rows go by the submissions' times, so that neither names nor the order of the table move an interval.
    individual = rng.standard_normal(shape)[:, table.draw_order]
    common = rng.standard_normal((draws, 1, shape[2]))
    return np.sqrt(1 - correlation) * individual + np.sqrt(correlation) * common


def _intervals(
    table: StudyTable, estimate: Array, variance: Array, dof: float, log_medians: Array, noise: Array, level: float
) -> tuple[Array, Array]:
    """Ends of the intervals of the log medians: t intervals, and quantiles of the draws where cells are censored.

    noise: that the studies share [D, S, W], on top of `log_medians`; variance is without it.
    """
    timing_variance = table.shared_error**2
    # docs/statistics.md, eq. 14.
    width = stats.t.ppf((1 + level) / 2, dof) * np.sqrt(variance)
    total_dof = combined_dof(variance, dof, timing_variance, table.shared_dof)
    total_width = stats.t.ppf((1 + level) / 2, total_dof) * np.sqrt(variance + timing_variance)
    low, high, reach = estimate - total_width, estimate + total_width, estimate + width
    # The posterior of a censored cell is skewed, so its interval is not symmetric about the estimate.
    has_miss = table.miss_count > 0
    if has_miss.any():
        noisy = (log_medians + noise)[:, has_miss]
        low[has_miss] = np.quantile(noisy, (1 - level) / 2, axis=0)
        high[has_miss] = np.quantile(noisy, (1 + level) / 2, axis=0)
        reach[has_miss] = np.quantile(log_medians[:, has_miss], (1 + level) / 2, axis=0)
    # Nothing was observed beyond the horizon, so no end lies there. Without the errors that studies share,
    # which move the horizon too.
    is_open = (reach > table.log_horizon) | _never_met(table)
    return np.minimum(low, table.log_horizon), np.where(is_open, np.inf, high)


# ---- the bootstrap -------------------------------------------------------------------------------------------------


def bootstrap(
    table: StudyTable, correlation: float, level: float, rng: np.random.Generator, draws: int = DRAWS
) -> MedianModel:
    """The smoothed bootstrap of the cells' medians, with intervals at `level` (docs/statistics.md, section 9).

    With a correlation other than 0, a draw takes the same studies of all submissions.
    """
    estimate, log_medians = _resampled_medians(table, bool(correlation), rng, draws)
    never = table.hit_count == 0
    log_medians = np.where(never, np.inf, log_medians)
    limited = np.where(log_medians > table.log_horizon, np.inf, log_medians)
    capped = np.minimum(log_medians, table.log_horizon)
    bound = np.where(table.median_missed, table.log_bound, np.minimum(estimate, table.log_horizon))

    # docs/statistics.md, eq. 44. A draw beyond the horizon enters the variance at the horizon: how far beyond it is,
    # the data do not tell.
    finite = np.where(np.isfinite(capped), capped, 0.0)
    deviation = finite - finite.mean(axis=0)
    # Above zero, since comparisons divide by it.
    variance = (deviation**2).mean(axis=0) + 1e-24
    noise = timing_noise(table, draws, rng)
    timing_variance = table.shared_error**2
    noisy = limited + noise
    covariance = np.zeros((len(estimate), *estimate.shape))
    if correlation:
        covariance = np.einsum("daw,dbw->abw", deviation, deviation) / draws
    # inverted_cdf, as interpolation between a finite and an infinite draw gives NaN.
    low, high = np.quantile(noisy, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    return MedianModel(
        estimate=bound,
        variance=variance + timing_variance,
        timing_variance=timing_variance,
        timing_dof=table.shared_dof,
        covariance=covariance,
        bound=bound,
        bound_variance=variance + timing_variance,
        dof=np.maximum(table.study_count - 1, 1),
        has_shared_dof=False,
        draws=noisy,
        # Resampling knows no times beyond the horizon: such a draw is a miss at the horizon.
        latent_draws=np.where(never, np.inf, capped + noise),
        timing_noise=noise,
        low=np.minimum(low, table.log_horizon),
        high=high,
        correlation=correlation,
        means=cell_means(table, correlation),
    )


def _resampled_medians(table: StudyTable, paired: bool, rng: np.random.Generator, draws: int) -> tuple[Array, Array]:
    """The log medians [S, W], infinite where half of the studies missed, and D resampled ones [D, S, W]."""
    submissions, workloads, studies = table.log_time.shape
    is_hit, is_miss = table.is_hit, table.is_miss
    medians = np.full((submissions, workloads), np.nan)
    resampled = np.full((draws, submissions, workloads), np.nan)
    for w in range(workloads):
        common = rng.random((draws, studies if paired else 0))
        # By times, as in `_seed_noise`, so that the random numbers of a submission do not depend on its name.
        for s in np.argsort(table.draw_order):
            values = np.where(is_hit[s, w], table.log_time[s, w], np.inf)[is_hit[s, w] | is_miss[s, w]]
            n = len(values)
            if not n:
                continue
            uniform = common[:, :n] if paired else rng.random((draws, n))
            noise = rng.standard_normal((draws, n))
            hits = values[np.isfinite(values)]
            sd = hits.std(ddof=1) if len(hits) > 1 else 0.0
            # docs/statistics.md, eq. 42 and 43.
            smoothing = max(SMOOTHING * sd * n**-0.2, uniform_sd(table.resolution[s, w][is_hit[s, w]]), 1e-12)
            resampled[:, s, w] = np.median(values[(uniform * n).astype(np.intp)] + smoothing * noise, axis=1)
            medians[s, w] = np.median(values)
    return medians, resampled
