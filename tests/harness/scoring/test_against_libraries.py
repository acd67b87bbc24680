"""The models of docs/statistics.md against implementations that share no code with ours.

Without misses: ordinary least squares, analysis of variance and Welch's test of statsmodels. With misses: the
log-normal accelerated-failure-time model of lifelines, which is the same likelihood (right-censored log-normal times,
a median per cell, one scale), maximised where ours is integrated. Corrections for several tests: statsmodels.
"""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from harness.scoring.comparisons import holm, log_ratios, pair_workloads
from harness.scoring.interval_models import MedianModel, SigmaPosterior, t_model
from harness.scoring.pooled_noise import Pairing, pooled_noise
from harness.scoring.study_table import StudyTable, tabulate
from harness.scoring.uncertainty import estimate

sm = pytest.importorskip("statsmodels.api", reason="needs statsmodels: pip install -e '.[dev]'")
multitest = pytest.importorskip("statsmodels.stats.multitest")
weightstats = pytest.importorskip("statsmodels.stats.weightstats")

MEDIANS = np.log([[3.0, 4.0, 2.5], [2.0, 6.0, 4.0]])
"""Log medians [submissions, workloads]."""
SIGMA = 0.2
UNPAIRED = Pairing(0.0, np.nan, 1.0, "")


def simulate(
    studies: int, seed: int, *, log_limits: float | np.ndarray = np.inf, submissions: int = 2, correlation: float = 0.0
) -> pd.DataFrame:
    """Studies of every cell; log_limits: [submissions, workloads], beyond which a study misses."""
    rng = np.random.default_rng(seed)
    log_medians = np.resize(MEDIANS, (submissions, 3))
    shape = (*log_medians.shape, studies)
    noise = np.sqrt(1 - correlation) * rng.standard_normal(shape)
    noise += np.sqrt(correlation) * rng.standard_normal((1, *shape[1:]))
    log_times = (log_medians[..., None] + SIGMA * noise).ravel()
    submission, workload, study = (index.ravel() for index in np.indices(shape))
    limits = np.broadcast_to(np.asarray(log_limits)[..., None], shape).ravel()
    is_hit = log_times <= limits
    return pd.DataFrame(
        {
            "submission": np.array(["a", "b", "c"])[submission],
            "workload": np.array(["u", "v", "w"])[workload],
            "study": study,
            "time": np.where(is_hit, np.exp(log_times), np.inf),
            "limit": np.exp(np.where(is_hit, log_times, limits)),
            "resolution": np.nan,
        }
    )


def drop_studies(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """An unbalanced table: a third of the rows is missing, at least one of each cell remains."""
    kept = np.random.default_rng(seed).random(len(rows)) > 1 / 3
    return rows[kept | (rows["study"] == 0)].reset_index(drop=True)


def fit(rows: pd.DataFrame, pairing: Pairing = UNPAIRED) -> tuple[StudyTable, MedianModel, SigmaPosterior]:
    table = tabulate(rows)
    return table, *t_model(table, pairing, 0.95, np.random.default_rng(0))


def cell_indicators(rows: pd.DataFrame) -> pd.DataFrame:
    """A column of zeros and ones per cell, in the order of the flattened arrays [submissions, workloads]."""
    return pd.get_dummies(rows["submission"] + rows["workload"]).astype(float)


# ---- without misses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("balanced", [True, False])
def test_without_misses_the_t_model_is_ordinary_least_squares(balanced: bool, seed: int) -> None:
    rows = simulate(4, seed)
    if not balanced:
        rows = drop_studies(rows, seed)
    table, model, posterior = fit(rows)
    assert balanced == (np.ptp(table.hit_count) == 0)
    reference = sm.OLS(np.log(rows["time"]), cell_indicators(rows)).fit()
    assert posterior.dof == reference.df_resid
    assert posterior.sigma == pytest.approx(np.sqrt(reference.mse_resid), rel=1e-12)
    np.testing.assert_allclose(model.estimate.ravel(), reference.params, rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(model.variance.ravel()), reference.bse, rtol=1e-12)
    ends = np.stack([model.low.ravel(), model.high.ravel()], axis=1)
    np.testing.assert_allclose(ends, reference.conf_int(0.05), rtol=1e-12)


@pytest.mark.parametrize("balanced", [True, False])
def test_comparisons_without_misses_are_contrasts_of_ordinary_least_squares(balanced: bool) -> None:
    rows = simulate(4, seed=7)
    if not balanced:
        rows = drop_studies(rows, seed=7)
    pair = estimate(rows, baseline=None).pairs.iloc[0]
    contrast = np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]) / 3
    reference = sm.OLS(np.log(rows["time"]), cell_indicators(rows)).fit().t_test(contrast)
    assert pair["log_ratio"] == pytest.approx(reference.effect.item(), rel=1e-10)
    assert [pair["low"], pair["high"]] == pytest.approx(reference.conf_int(0.05)[0].tolist(), rel=1e-10)
    assert pair["p"] == pytest.approx(reference.pvalue.item(), rel=1e-8)


def test_paired_comparisons_are_those_of_a_randomized_block_design() -> None:
    """A complete table with correlated noise: submissions and studies as two factors on each workload."""
    rows = simulate(6, seed=1, correlation=0.9)
    uncertainty = estimate(rows, baseline=None)
    assert "pairs paired by seed" in uncertainty.method
    cells = cell_indicators(rows)
    blocks = pd.get_dummies(rows["workload"] + rows["study"].astype(str)).astype(float)
    # A study's effect is the difference to study 0 of its workload, which the cells' means hold already.
    design = cells.join(blocks.loc[:, ~blocks.columns.str.endswith("0")])
    contrast = np.zeros(design.shape[1])
    contrast[:6] = np.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]) / 3
    fitted = sm.OLS(np.log(rows["time"]), design).fit()
    reference = fitted.t_test(contrast)
    pairing = pooled_noise(tabulate(rows)).pairing
    assert pairing.dof == fitted.df_resid == 15
    pair = uncertainty.pairs.iloc[0]
    assert pair["log_ratio"] == pytest.approx(reference.effect.item(), rel=1e-10)
    assert [pair["low"], pair["high"]] == pytest.approx(reference.conf_int(0.05)[0].tolist(), rel=1e-10)
    assert pair["p"] == pytest.approx(reference.pvalue.item(), rel=1e-8)


def test_the_test_for_pairing_is_the_f_test_of_the_blocks() -> None:
    """Its p value is that of comparing the models with and without studies as a factor."""
    rows = simulate(6, seed=2, submissions=3, correlation=0.3)
    cells = cell_indicators(rows)
    blocks = pd.get_dummies(rows["workload"] + rows["study"].astype(str)).astype(float)
    log_times = np.log(rows["time"])
    with_blocks = sm.OLS(log_times, cells.join(blocks.loc[:, ~blocks.columns.str.endswith("0")])).fit()
    _, p, _ = with_blocks.compare_f_test(sm.OLS(log_times, cells).fit())
    assert f"p {p:.2g})" in pooled_noise(tabulate(rows)).pairing.sentence


def test_degrees_of_freedom_are_welchs() -> None:
    """One workload and a variance per cell, as in the bootstrap."""
    samples = [
        np.log(4) + np.random.default_rng(i).normal(0, sd, n) for i, (sd, n) in enumerate([(0.1, 10), (0.4, 14)])
    ]
    times = np.exp(np.concatenate(samples))
    rows = pd.DataFrame({"submission": ["a"] * 10 + ["b"] * 14, "workload": "w", "study": [*range(10), *range(14)]})
    table = tabulate(rows.assign(time=times, limit=times, resolution=np.nan))
    unused = np.full((2, 1), np.nan)
    model = MedianModel(
        estimate=np.array([[sample.mean()] for sample in samples]),
        variance=np.array([[sample.var(ddof=1) / len(sample)] for sample in samples]),
        covariance=np.zeros((2, 2, 1)),
        bound=unused,
        bound_variance=unused,
        timing_variance=np.zeros((2, 1)),
        timing_dof=1.0,
        timing_noise=unused,
        dof=table.study_count - 1,
        has_shared_dof=False,
        draws=unused,
        latent_draws=unused,
        low=unused,
        high=unused,
        correlation=0.0,
    )
    pair = pair_workloads(table, np.array([0]), np.array([1]), np.ones((1, 1), dtype=bool))
    log_ratio, error, dof = log_ratios(table, model, pair)
    t, p, reference_dof = weightstats.CompareMeans(*map(weightstats.DescrStatsW, samples)).ttest_ind(usevar="unequal")
    assert dof[0] == pytest.approx(reference_dof, rel=1e-10)
    assert log_ratio[0] / error[0] == pytest.approx(t, rel=1e-10)
    assert 2 * stats.t.sf(abs(t), dof[0]) == pytest.approx(p, rel=1e-10)


# ---- with misses ---------------------------------------------------------------------------------------------------

# In units of sigma above the median: 20%, 40% and 31% of the studies of three cells miss, and none of the others.
LOG_LIMITS = MEDIANS + SIGMA * np.array([[0.84, 5.0, 0.25], [5.0, 5.0, 0.5]])


def maximum_likelihood(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, float]:
    """Log medians, their standard errors (both in the order of the cells) and sigma by lifelines."""
    lifelines = pytest.importorskip("lifelines", reason="needs lifelines: pip install -e '.[dev]'")
    is_hit = np.isfinite(rows["time"])
    data = cell_indicators(rows).assign(duration=np.where(is_hit, rows["time"], rows["limit"]), met=is_hit)
    fitter = lifelines.LogNormalAFTFitter(fit_intercept=False)
    with warnings.catch_warnings():
        # It warns of the constant column that it adds for sigma itself.
        warnings.simplefilter("ignore")
        fitter.fit(data, "duration", "met")
    medians, errors = (table["mu_"].to_numpy() for table in (fitter.params_, fitter.standard_errors_))
    return medians, errors, float(np.exp(fitter.params_["sigma_"].iloc[0]))


@pytest.mark.parametrize("studies", [8, 30, 120])
def test_with_misses_the_t_model_approaches_the_log_normal_aft_model(studies: int) -> None:
    """The differences of a posterior mean and a maximum of the likelihood, with n studies per cell.

    Medians differ by about sigma / n, by the skewness of the posterior. Maximum likelihood has a smaller sigma and
    smaller standard errors: it lacks the factor sqrt(N / (N - cells)) for the fitted medians, about 1 + 1 / 2n.
    Ours are for the nearest sigma of a grid: half a step of it is the 0.015.
    """
    rows = simulate(studies, seed=1, log_limits=LOG_LIMITS)
    table, model, posterior = fit(rows)
    assert table.miss_count.sum() >= 3
    medians, errors, sigma = maximum_likelihood(rows)
    assert np.abs(model.estimate.ravel() - medians).max() <= 1.5 * sigma / studies
    assert 0 <= posterior.sigma / sigma - 1 <= 1 / studies
    assert np.abs(np.sqrt(model.variance.ravel()) / errors - 1).max() <= 1.2 / studies + 0.015


def test_misses_are_neither_dropped_nor_taken_as_hits() -> None:
    """Either would be far outside the tolerance of the test above."""
    rows = simulate(60, seed=5, log_limits=LOG_LIMITS)
    is_hit = np.isfinite(rows["time"])
    most_censored = np.s_[0, 2]
    *_, model, posterior = fit(rows)
    tolerance = 1 / 60
    for wrong in (rows[is_hit], rows.assign(time=np.where(is_hit, rows["time"], rows["limit"]))):
        *_, wrong_model, wrong_posterior = fit(wrong.reset_index(drop=True))
        assert model.estimate[most_censored] - wrong_model.estimate[most_censored] > 5 * tolerance * SIGMA
        assert posterior.sigma / wrong_posterior.sigma - 1 > 2 * tolerance
        medians, _, sigma = maximum_likelihood(rows)
        assert np.abs(wrong_model.estimate.ravel() - medians).max() > 5 * tolerance * sigma


# ---- several tests -------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.floats(0, 1), st.just(0.01), st.just(np.nan)), max_size=12))
@example([np.nan, 0.01, 0.01, 0.04, np.nan, 0.03])
def test_holm_is_that_of_statsmodels(values: list[float]) -> None:
    """NaN is no test: it stays NaN and the others are corrected without it."""
    p = np.array(values, dtype=float)
    is_tested = ~np.isnan(p)
    expected = np.full(len(p), np.nan)
    if is_tested.any():
        with pytest.MonkeyPatch.context() as patch:
            # It collects garbage in every call, which takes 0.1 s.
            patch.setattr(gc, "collect", lambda: 0)
            expected[is_tested] = multitest.multipletests(p[is_tested], method="holm")[1]
    np.testing.assert_allclose(holm(p), expected, rtol=1e-12)
