"""Best of k against brute force over all orders, and what a board shows of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.board.files import format_files
from harness.board.page_data import page_data
from harness.config.search_space import parse_search_space
from harness.scoring import tunability
from harness.scoring.leaderboard import score
from harness.scoring.load_records import load_records
from tests.harness.folders import pacemark_trial

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

times = st.lists(st.one_of(st.floats(1, 100), st.just(np.inf)), min_size=1, max_size=6)

TEXTS = ("scores.csv", "times.csv", "LEADERBOARD.md", "leaderboard.tex")


def trials_of(studies: list[list[float]], **more: Any) -> pd.DataFrame:
    rows = [
        {"submission": "a", "workload": "lm", "study": s, "trial": t, "seconds": seconds, "status": "reached"} | more
        for s, of_study in enumerate(studies)
        for t, seconds in enumerate(of_study, 1)
    ]
    return pd.DataFrame(rows)


def measured(studies: list[list[float]], fastest: float = 10.0, **more: Any) -> pd.DataFrame:
    result = tunability.measure(trials_of(studies, **more), pd.Series({"lm": fastest}), ("lm",), {})
    assert result is not None
    return result.cells


@given(times)
def test_best_of_k_is_the_mean_over_all_orders(drawn: list[float]) -> None:
    values = np.array([0.0 if np.isinf(t) else 1 / t for t in drawn])
    orders = np.array(list(itertools.permutations(values)))
    brute = np.maximum.accumulate(orders, axis=1).mean(axis=0)
    ours = tunability.best_of(values)
    np.testing.assert_allclose(ours, brute, rtol=1e-12, atol=1e-12)
    assert (np.diff(ours) >= -1e-12).all()


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.one_of(st.floats(1, 100), st.just(np.inf)), min_size=2, max_size=4), min_size=1, max_size=3)
)
def test_cells_are_the_means_over_orders_and_studies_and_never_fall_with_k(studies: list[list[float]]) -> None:
    cells = measured(studies)
    assert cells["k"].tolist() == list(range(1, min(map(len, studies)) + 1))
    for k, row in enumerate(cells.itertuples(), 1):
        best = [[min(order[:k]) for order in itertools.permutations(s)] for s in studies]
        assert row.reached == pytest.approx(np.mean([np.isfinite(b).mean() for b in best]))
        contribution = [np.mean(np.clip((4 - np.array(b) / 10) / 3, 0, 1)) for b in best]
        assert row.score == pytest.approx(np.mean(contribution))
        together = np.concatenate([np.sort(np.repeat(b, 1000 // len(b))) for b in best])
        assert row.seconds in together
        assert (together <= row.seconds).mean() >= 0.49 and (together < row.seconds).mean() <= 0.51
    assert (np.diff(cells["reached"]) >= -1e-12).all() and (np.diff(cells["score"]) >= -1e-12).all()
    assert (np.diff(cells["seconds"].replace(np.inf, 1e9)) <= 0).all()
    for name in ("reached", "score"):
        known = cells.dropna(subset=[f"{name}_low"])
        assert (known[f"{name}_low"] <= known[name]).all() and (known[name] <= known[f"{name}_high"]).all()
        assert known[f"{name}_high"].max() <= 1 + 1e-12 or known.empty


def test_the_estimate_is_unbiased_and_the_intervals_are_honest() -> None:
    """Trials drawn from a known distribution: 60% meet the target, at 10 to 30 seconds; 3 studies of 5 trials."""
    rng = np.random.default_rng(0)
    grid = np.linspace(10, 30, 10_001)
    tables = []
    for _ in range(100):
        drawn = np.where(rng.random((3, 5)) < 0.6, rng.uniform(10, 30, (3, 5)), np.inf)
        tables.append(measured(drawn.tolist()).set_index("k"))
    for k in (1, 3, 5):
        chance = 1 - 0.4**k
        survival = (1 - 0.6 * (grid - 10) / 20) ** k
        score = np.trapezoid((1 - survival) / 10 / 3, grid) + chance * (4 - 3) / 3
        reached = np.array([t.loc[k, "reached"] for t in tables])
        assert reached.mean() == pytest.approx(chance, abs=0.03)
        assert np.mean([t.loc[k, "score"] for t in tables]) == pytest.approx(score, abs=0.03)
        covered = np.mean([t.loc[k, "reached_low"] <= chance <= t.loc[k, "reached_high"] for t in tables])
        assert stats.binom.cdf(round(covered * 100), 100, 0.95) > 0.001
        # The bootstrap is a little narrow with fifteen trials, which its docstring does not hide.
        assert np.mean([t.loc[k, "score_low"] <= score <= t.loc[k, "score_high"] for t in tables]) > 0.85


def test_few_trials_have_no_interval_and_single_trials_no_tunability() -> None:
    assert measured([[12.0, np.inf]])["score_low"].isna().all()
    assert tunability.measure(trials_of([[12.0], [13.0]]), pd.Series({"lm": 10.0}), ("lm",), {}) is None
    assert measured([[12.0, 11.0]], fastest=np.inf)["score"].tolist() == [0, 0]


def test_studies_with_pruned_trials_are_refused() -> None:
    trials = trials_of([[12.0, np.inf], [12.0, 20.0]])
    trials.loc[1, "status"] = "pruned"
    result = tunability.measure(trials, pd.Series({"lm": 10.0}), ("lm",), {})
    assert result is not None and result.cells["studies"].tolist() == [1, 1]
    assert "leaves out 1 studies with pruned trials" in result.left_out[0]
    assert tunability.measure(trials[trials["study"] == 0], pd.Series({"lm": 10.0}), ("lm",), {}) is None


@pytest.mark.parametrize(
    "leaf", [{"log": [1e-3, 1e-1]}, {"linear": [0.0, 2.0]}, {"one_minus_log": [0.8, 0.999]}, {"integer": [1, 9]}]
)
def test_the_position_of_a_value_is_its_quantile(leaf: dict[str, Any]) -> None:
    (dimension,) = parse_search_space({"hyperparameters": {"x": leaf}}).dimensions
    low, high = dimension.values
    assert dimension.position(low) == 0 and dimension.position(high) == pytest.approx(1)
    if "integer" not in leaf:
        assert [dimension.position(dimension.value(u)) for u in (0.2, 0.7)] == pytest.approx([0.2, 0.7])


SPACE = {
    "hyperparameters": {"lr": {"log": [1e-3, 1e-1]}, "betas": [{"one_minus_log": [0.8, 0.98]}, 0.999]},
    "warmup_fraction": {"choices": [0.0, 0.1, 0.2, 0.3]},
}


def tuned(root: Path) -> Path:
    for study in range(3):
        for trial, (lr, warmup) in enumerate([(1e-3, 0.1), (1e-2, 0.1), (1e-1, 0.0), (3e-2, 0.3)], 1):
            recipe = {"hyperparameters": {"lr": lr, "betas": [0.9, 0.999]}, "warmup_fraction": warmup}
            pacemark_trial(
                root, [3, 3 if trial in (1, 3) else 1, 3], 10.0 + trial + study, study=study, trial=trial,
                ruleset="external", config={"optimizer": {"search_space": SPACE, "recipe": recipe}},
            )  # fmt: skip
    return root


def test_bands_are_the_ranges_of_the_points_that_reach(tmp_path: Path) -> None:
    board = score(load_records([tuned(tmp_path)]))
    assert board.tunability is not None
    bands = board.tunability.bands.set_index("hyperparameter")
    assert bands.loc["hyperparameters.lr", ["reached_low", "reached_high"]].tolist() == [1e-2, 3e-2]
    assert bands.loc["hyperparameters.lr", "width"] == pytest.approx(np.log10(3) / 2)
    assert bands.loc["hyperparameters.betas[0]", "width"] == 0
    assert bands.loc["warmup_fraction", "width"] == 0.5
    assert "hyperparameters.betas[1]" not in bands.index


def test_the_board_shows_tunability_where_studies_have_several_trials(tmp_path: Path) -> None:
    board = score(load_records([tuned(tmp_path / "tuned")]))
    texts = format_files(board, "t", [])
    assert set(texts) == {*TEXTS, "tunability.csv", "bands.csv"}
    markdown = texts["LEADERBOARD.md"]
    assert "## Tunability" in markdown and "| 6 of 12, 21 to 79% |" in markdown
    cells = board.tunability.cells  # type: ignore[union-attr]
    assert cells["reached"].round(4).tolist() == [0.5, 0.8333, 1, 1]
    assert (
        texts["tunability.csv"]
        .splitlines()[0]
        .startswith("submission,workload,k,studies,trials,trials_reached,reached")
    )
    page = page_data(board, "t", [])["submissions"][0]["tunability"]
    assert page["curves"]["lm"]["k"] == [1, 2, 3, 4] and len(page["bands"]) == 3
    pacemark_trial(tmp_path / "single", [3, 1])
    single = score(load_records([tmp_path / "single"]))
    assert single.tunability is None and set(format_files(single, "t", [])) == set(TEXTS)
    assert page_data(single, "t", [])["submissions"][0]["tunability"] is None
