"""Models of what a table of studies says about each cell's median log time; harness/uncertainty.py makes intervals of
scores, speed-ups and comparisons from them.

A cell is a (submission, workload) with one log time per study; arrays are float [submissions, workloads, studies] or
[submissions, workloads], absent entries NaN.

- `t_model`, for few studies. Log times are normal around the cell's own median, with one standard deviation for the
  whole table; a miss says only that the time is beyond the limit (Tobit; Tobin 1958). The cells' medians are integrated
  out under a flat prior and sigma has the prior 1 / sigma, so that without misses every interval is exactly the t
  interval with the pooled degrees of freedom.
- `bootstrap`, for ten or more: resampled medians, each cell with its own spread, smoothed (Silverman & Young 1987),
  since the medians of a resampled handful take a handful of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

MIN_DOF = 4
"""Pooled degrees of freedom below which there is no interval: a t quantile above 2.8 says little."""
PAIRING_LEVEL = 0.01
"""Pairing by seed is used where a one-sided F test finds the common correlation above zero at this level,
a strict one: where it is found by chance, the paired variance is too small and equals differ too often."""
DRAWS = 2000
SIGMA_POINTS = 48
MEDIAN_POINTS = 128
SMOOTHING = 0.5
"""Width of the bootstrap's noise over s * n**(-1/5)."""

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Table:
    """The studies as arrays [submissions, workloads, studies], times on a log scale."""

    submissions: list[str]
    workloads: list[str]
    log_time: Array
    """NaN for a miss or no study."""
    log_limit: Array
    """How long a miss trained, otherwise NaN: a study that met its target may have stopped there."""
    limit: Array
    """Log of the longest that the cell's studies trained or could have; infinite where nothing missed and no budget is
    known: [submissions, workloads]."""
    resolution: Array
    """Relative, (time - time of the evaluation before) / time, in [0, 1); 0 where unknown."""
    order: NDArray[np.intp]
    """Position of each submission in an order that depends on its times and not on its name."""

    @property
    def hit(self) -> Mask:
        return np.isfinite(self.log_time)

    @property
    def miss(self) -> Mask:
        return np.isfinite(self.log_limit)

    @property
    def hits(self) -> Array:
        return self.hit.sum(axis=-1).astype(float)

    @property
    def count(self) -> Array:
        return self.hits + self.miss.sum(axis=-1)

    @property
    def missed(self) -> Mask:
        """The median over studies is infinite: [submissions, workloads]."""
        return (self.count > 0) & (2 * self.hits <= self.count)

    @property
    def log_resolution(self) -> Array:
        """How much earlier, in log time, the crossing can have been; mean over hits, 0 without: [S, W]."""
        widths = np.where(self.hit, -np.log1p(-self.resolution), 0.0)
        return widths.sum(axis=-1) / np.maximum(self.hits, 1)


@dataclass(frozen=True)
class Model:
    """What a model says about log medians. Arrays [submissions, workloads] unless noted, NaN for absent cells."""

    centre: Array
    variance: Array
    """Squared standard error of `centre`."""
    covariance: Array
    """Between two submissions on a workload: [submissions, submissions, workloads]; zero unless paired."""
    bound: Array
    """Where the cell is missed: a log time that the median is at least, up to the error `bound_variance`."""
    bound_variance: Array
    dof: Array
    """Degrees of freedom of each variance."""
    shared_dof: bool
    """The variances are multiples of one estimate, so that their sum has the same degrees of freedom."""
    draws: Array
    """Joint draws of the log medians, [draws, submissions, workloads]; infinite beyond the limit."""
    unlimited: Array
    """The same without the limit; infinite only where nothing was ever met."""
    low: Array
    high: Array
    correlation: float
    """Of two submissions' noise under the same seed, 0 unless paired."""


def tabulate(studies: pd.DataFrame) -> Table:
    submissions, s = np.unique(studies["submission"].to_numpy(dtype=str), return_inverse=True)
    workloads, w = np.unique(studies["workload"].to_numpy(dtype=str), return_inverse=True)
    numbers, k = np.unique(studies["study"].to_numpy(), return_inverse=True)
    time, limit, resolution = (studies[column].to_numpy(dtype=float) for column in ("time", "limit", "resolution"))
    hit = np.isfinite(time)
    shape = (len(submissions), len(workloads), len(numbers))
    # A miss of unknown length is taken to have trained as long as anything did on its workload.
    known = np.where(hit, time, np.where(np.isfinite(limit), limit, -np.inf))
    longest = np.full(len(workloads), -np.inf)
    np.maximum.at(longest, w, known)
    limit = np.where(np.isfinite(limit), limit, np.where(np.isfinite(longest[w]), longest[w], 1.0))
    budget = studies["budget"].to_numpy(dtype=float) if "budget" in studies else np.full(len(studies), np.nan)
    most, missed = np.full(shape[:2], -np.inf), np.zeros(shape[:2], dtype=bool)
    missed[s[~hit], w[~hit]] = True
    # Where studies missed, what they trained is what the cell could have.
    could = np.where(missed[s, w], time, np.where(np.isfinite(budget), np.maximum(budget, time), -np.inf))
    np.maximum.at(most, (s, w), np.where(hit, could, limit))
    log_time, log_limit, relative = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape)
    log_time[s[hit], w[hit], k[hit]] = np.log(time[hit])
    log_limit[s[~hit], w[~hit], k[~hit]] = np.log(limit[~hit])
    with np.errstate(invalid="ignore"):
        relative[s, w, k] = np.where(hit & (resolution > 0), np.minimum(resolution / time, 1 - 1e-9), 0.0)
    # Noise is dealt out in this order, so that no name changes a number.
    order = np.empty(shape[0], dtype=np.intp)
    if shape[0]:
        keys = np.concatenate([table.reshape(shape[0], -1) for table in (log_time, log_limit)], axis=1)
        order[np.lexsort(np.nan_to_num(keys, nan=np.inf).T[::-1])] = np.arange(shape[0])
    with np.errstate(divide="ignore"):
        longest_of_cell = np.where(most > 0, np.log(np.maximum(most, 0.0)), np.inf)
    return Table(list(submissions), list(workloads), log_time, log_limit, longest_of_cell, relative, order)


def mean_of_hits(table: Table) -> Array:
    """Mean log time of the studies that met the target, NaN where none did: [submissions, workloads]."""
    total = np.where(table.hit, table.log_time, 0.0).sum(axis=-1)
    return np.where(table.hits > 0, total / np.maximum(table.hits, 1), np.nan)


def _resolution_sd(table: Table) -> float:
    """Standard deviation that the evaluations' spacing alone implies: uniform over it, width / sqrt(12)."""
    return float(np.sqrt((table.resolution[table.hit] ** 2).mean() / 12)) if table.hit.any() else 0.0


@dataclass(frozen=True)
class Pairing:
    """What the same study number, hence the same data order, has in common between submissions."""

    correlation: float
    """Of log times under the same seed; 0 where pairing was not shown to help."""
    dof: float
    """Degrees of freedom of a paired difference's variance."""
    efficiency: float
    """Effective over nominal degrees of freedom of the pooled variance; correlated residuals tell less."""
    found: str


def spread(table: Table) -> tuple[float, float, Pairing]:
    """Pooled sd of the hits' log times, its degrees of freedom, and whether to pair by seed.

    The correlation is estimated where whole blocks exist, workload by workload among the submissions that met the
    target in every study, from the mean squares of a two-way layout without interaction: between studies (B) and
    residual (R), B = sigma^2 (1 + (S - 1) rho), R = sigma^2 (1 - rho).
    """
    residual = np.where(table.hit, table.log_time - mean_of_hits(table)[..., None], 0.0)
    dof = float(np.maximum(table.hits - 1, 0).sum())
    sigma = max(float(np.sqrt((residual**2).sum() / max(dof, 1))), _resolution_sd(table))
    between = within = between_dof = within_dof = rows = 0.0
    for w in range(len(table.workloads)):
        studies = (table.hit | table.miss)[:, w].any(axis=0)
        whole = table.hit[:, w][:, studies].all(axis=1)
        if whole.sum() < 2 or studies.sum() < 2:
            continue
        block = residual[:, w][np.ix_(whole, studies)]
        common = block.mean(axis=0)
        between += block.shape[0] * (common**2).sum()
        within += ((block - common) ** 2).sum()
        between_dof += block.shape[1] - 1
        within_dof += (block.shape[1] - 1) * (block.shape[0] - 1)
        rows += block.shape[0] * (block.shape[1] - 1)
    if within_dof < MIN_DOF or within <= 0:
        unknown = "pairs not paired by seed: too few complete studies to see whether that helps"
        return sigma, dof, Pairing(0.0, dof, 1.0, unknown)
    b, r, size = between / between_dof, within / within_dof, rows / between_dof
    correlation = (b - r) / (b + (size - 1) * r)
    p = float(stats.f.sf(b / r, between_dof, within_dof))
    found = f"correlation of submissions under the same seed {correlation:.2f}, p {p:.2g}"
    if p > PAIRING_LEVEL:
        unhelpful = f"pairs not paired by seed, for that was not shown to help ({found})"
        return sigma, dof, Pairing(0.0, dof, 1.0, unhelpful)
    effective = (between + within) ** 2 / (between**2 / between_dof + within**2 / within_dof)
    efficiency = effective / (between_dof + within_dof)
    return sigma, dof, Pairing(correlation, within_dof, efficiency, f"pairs paired by seed, for that helps ({found})")


def _noise(table: Table, correlation: float, rng: np.random.Generator) -> Array:
    """Standard normal [draws, submissions, workloads], correlated between submissions on a workload."""
    own = rng.standard_normal((DRAWS, len(table.submissions), len(table.workloads)))[:, table.order]
    common = rng.standard_normal((DRAWS, 1, len(table.workloads)))
    return np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common


def t_model(table: Table, pairing: Pairing, level: float, rng: np.random.Generator) -> tuple[Model, float, float]:
    """The t model, its sigma and its degrees of freedom."""
    mean, hits, misses = mean_of_hits(table), table.hits, table.miss.sum(axis=-1)
    residual = np.where(table.hit, table.log_time - mean[..., None], 0.0)
    dof = float(np.maximum(hits - 1, 0).sum())
    # Times that all cross at the same evaluation have no spread of their own, but the evaluations' spacing hides one.
    square = max(float((residual**2).sum()), dof * max(_resolution_sd(table), 1e-12) ** 2)
    dof, square = dof * pairing.efficiency, square * pairing.efficiency
    correlation = pairing.correlation
    partial = (hits > 0) & (misses > 0)
    never = (hits == 0) & (misses > 0)
    ps, pw = np.nonzero(partial)
    uniform = (np.arange(DRAWS) + 0.5) / DRAWS

    # Posterior of log sigma on a grid: an inverse chi-square from the hits, times what the misses say.
    tail = stats.chi2.ppf([1 - 1e-5, 1e-5], dof)
    spread = np.sqrt(square / tail) * [1.0, 2.0 if partial.any() else 1.0]
    sigmas = np.geomspace(spread[0], spread[1], SIGMA_POINTS)
    density = -dof * np.log(sigmas) - square / (2 * sigmas**2)
    points, cdf, log_evidence = _censored_medians(
        mean[ps, pw],
        hits[ps, pw],
        [table.log_limit[s, w][table.miss[s, w]] for s, w in zip(ps, pw, strict=True)],
        sigmas,
    )
    density = density + log_evidence.sum(axis=0)
    density = np.exp(density - density.max())
    density /= density.sum()
    if partial.any():
        precision = (density / sigmas**2).sum()
        dof = float(2 * precision**2 / (density * (sigmas**-2 - precision) ** 2).sum())
        sigma = float(precision**-0.5)
        cumulative = np.cumsum(density) - density / 2
        sigma_draws = np.exp(np.interp(uniform, cumulative, np.log(sigmas)))
    else:
        sigma = float(np.sqrt(square / dof))
        sigma_draws = np.sqrt(square / stats.chi2.ppf(1 - uniform, dof))

    noise = _noise(table, correlation, rng)
    size = np.maximum(hits, 1)
    centre, variance = mean.copy(), sigma**2 / size
    draws = mean + sigma_draws[:, None, None] * noise / np.sqrt(size)
    if partial.any():
        nearest = np.abs(np.log(sigma_draws)[:, None] - np.log(sigmas)).argmin(axis=1)
        here = int(np.abs(np.log(sigma) - np.log(sigmas)).argmin())
        mass = np.diff(cdf, axis=-1)
        middle = (points[..., 1:] + points[..., :-1]) / 2
        means = (mass * middle).sum(axis=-1)
        spreads = (mass * (middle - means[..., None]) ** 2).sum(axis=-1)
        centre[ps, pw] = (means * density).sum(axis=-1)
        variance[ps, pw] = spreads[:, here] + (density * (means - centre[ps, pw, None]) ** 2).sum(axis=-1)
        u = special.ndtr(noise[:, ps, pw])
        for g in np.unique(nearest):
            rows = np.nonzero(nearest == g)[0]
            for i in range(len(ps)):
                draws[rows, ps[i], pw[i]] = np.interp(u[rows, i], cdf[i, g], points[i, g])
    # All missed: the confidence distribution of the median, P(all miss | median), which reaches 1 only at infinity.
    beyond = special.ndtri(special.ndtr(noise[:, never]) ** (1 / misses[never]))
    draws[:, never] = table.limit[never] + sigma_draws[:, None] * beyond
    centre[never] = table.limit[never]

    width = stats.t.ppf((1 + level) / 2, dof) * np.sqrt(variance)
    low, high = centre - width, centre + width
    censored = partial | never
    low[censored] = np.quantile(draws[:, censored], (1 - level) / 2, axis=0)
    high[censored] = np.quantile(draws[:, censored], (1 + level) / 2, axis=0)
    low = np.minimum(low, table.limit)
    high = np.where((high > table.limit) | never, np.inf, high)

    common = table.hit.astype(float)
    shared = np.einsum("awk,bwk->abw", common, common) / (size[:, None] * size[None])
    model = Model(
        centre=centre,
        variance=variance,
        covariance=correlation * sigma**2 * shared,
        bound=np.minimum(centre, table.limit),
        bound_variance=sigma**2 / np.maximum(table.count, 1),
        dof=np.full(mean.shape, pairing.dof if correlation else dof),
        shared_dof=True,
        draws=np.where(draws > table.limit, np.inf, draws),
        unlimited=np.where(never, np.inf, draws),
        low=low,
        high=high,
        correlation=correlation,
    )
    return model, sigma, dof


def _censored_medians(mean: Array, hits: Array, limits: list[Array], sigmas: Array) -> tuple[Array, Array, Array]:
    """Posterior of the log medians of cells with hits and misses, for each sigma.

    For cells [C] with the hits' mean and number and the misses' log limits: points and cumulative probabilities [C,
    sigmas, points], and the log probability of the misses given the hits [C, sigmas].
    """
    furthest = np.array([limit.max() for limit in limits] or [0.0])[: len(limits)]
    scale = sigmas / np.sqrt(hits)[:, None]
    start = mean[:, None] - 6 * scale
    stop = np.maximum(mean, furthest)[:, None] + 6 * scale
    points = start[..., None] + (stop - start)[..., None] * np.linspace(0, 1, MEDIAN_POINTS)
    density = -0.5 * ((points - mean[:, None, None]) / scale[..., None]) ** 2
    most = max((len(limit) for limit in limits), default=0)
    padded = np.full((len(limits), most), -np.inf)
    for i, limit in enumerate(limits):
        padded[i, : len(limit)] = limit
    for k in range(most):
        density = density + special.log_ndtr((points - padded[:, k, None, None]) / sigmas[:, None])
    top = density.max(axis=-1, keepdims=True)
    density = np.exp(density - top)
    steps = (density[..., 1:] + density[..., :-1]) / 2
    total = steps.sum(axis=-1)
    cdf = np.concatenate([np.zeros_like(total)[..., None], np.cumsum(steps, axis=-1)], axis=-1) / total[..., None]
    width = points[..., 1] - points[..., 0]
    return points, cdf, np.log(total * width / scale) + top[..., 0]


def bootstrap(table: Table, correlation: float, level: float, rng: np.random.Generator) -> Model:
    """Medians of resampled studies, misses infinite; where pairing helps, the same studies for all submissions."""
    shape = (len(table.submissions), len(table.workloads))
    draws = np.full((DRAWS, *shape), np.nan)
    centre, most = np.full(shape, np.nan), table.log_time.shape[-1]
    by_order = np.argsort(table.order)
    for w in range(shape[1]):
        common = rng.random((DRAWS, most if correlation else 0))
        for s in by_order:
            taken = table.hit[s, w] | table.miss[s, w]
            values = np.where(table.hit[s, w], table.log_time[s, w], np.inf)[taken]
            n, met = len(values), np.isfinite(values)
            if not n:
                continue
            uniform = common[:, :n] if correlation else rng.random((DRAWS, n))
            noise = rng.standard_normal((DRAWS, n))
            sd = values[met].std(ddof=1) if met.sum() > 1 else 0.0
            grain = np.sqrt((table.resolution[s, w][table.hit[s, w]] ** 2).mean() / 12) if met.any() else 0.0
            smoothing = max(SMOOTHING * sd * n**-0.2, grain, 1e-12)
            draws[:, s, w] = np.median(values[(uniform * n).astype(np.intp)] + smoothing * noise, axis=1)
            centre[s, w] = np.median(values)
    never = table.hits == 0
    draws = np.where(never, np.inf, draws)
    limited = np.where(draws > table.limit, np.inf, draws)
    capped = np.minimum(draws, table.limit)
    bound = np.minimum(centre, table.limit)
    usable = np.where(np.isfinite(capped), capped, 0.0)
    deviation = usable - usable.mean(axis=0)
    variance = (deviation**2).mean(axis=0) + 1e-24
    covariance = np.einsum("daw,dbw->abw", deviation, deviation) / DRAWS if correlation else np.zeros(1)
    low, high = np.quantile(limited, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    return Model(
        centre=bound,
        variance=variance,
        covariance=np.broadcast_to(covariance, (shape[0], *shape)) if correlation else np.zeros((shape[0], *shape)),
        bound=bound,
        bound_variance=variance,
        dof=np.maximum(table.count - 1, 1),
        shared_dof=False,
        draws=limited,
        unlimited=np.where(never, np.inf, capped),
        low=np.minimum(low, table.limit),
        high=high,
        correlation=correlation,
    )
