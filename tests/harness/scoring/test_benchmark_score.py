from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from harness.scoring.benchmark_score import (
    algoperf_scores,
    benchmark_scores,
    disqualified,
    performance_profile,
    performance_ratios,
    qualified,
    speedups,
    study_times,
    times_to_target,
    unscored_held_out,
)
from harness.scoring.leaderboard import score
from harness.scoring.targets import Target, Targets
from harness.scoring.trials_table import read_trials_table
from tests.harness import algoperf

INF = np.inf
tables = arrays(
    float,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.one_of(st.floats(0.01, 1e6), st.just(INF)),
)


def targets(*base: str, held_out: tuple[str, ...] = ()) -> Targets:
    return Targets(base, held_out, {name: Target("loss", "min", 1.0) for name in (*base, *held_out)})


def test_the_score_of_a_small_table_by_hand() -> None:
    times = np.array([[10.0, 30.0, INF], [20.0, 20.0, INF], [50.0, 25.0, INF]])
    assert performance_ratios(times).tolist() == [[1, 1.5, INF], [2, 1, INF], [5, 1.25, INF]]
    # A ratio r gives (4 - r) / 3, the workload that nobody solved gives nothing and still counts in n = 3.
    assert benchmark_scores(times) == pytest.approx([(1 + 2.5 / 3) / 3, (2 / 3 + 1) / 3, (0 + 2.75 / 3) / 3])
    assert performance_profile(times, np.array([1.0, 1.5, 4.0])).tolist() == [
        [1 / 3, 2 / 3, 2 / 3], [1 / 3, 1 / 3, 2 / 3], [0, 1 / 3, 1 / 3]
    ]  # fmt: skip


@given(tables)
def test_the_closed_form_is_the_area_under_the_profile(times: np.ndarray) -> None:
    middles = np.linspace(1, 4, 6001)[:-1] + 3 / 12000
    assert benchmark_scores(times) == pytest.approx(performance_profile(times, middles).mean(axis=1), abs=2e-4)
    assert algoperf_scores(times) == pytest.approx(benchmark_scores(times), abs=0.6 / 99)


@given(tables, st.floats(1e-3, 1e3), st.randoms())
def test_scores_are_shares_and_know_no_order_and_no_unit(times: np.ndarray, unit: float, random: object) -> None:
    scores = benchmark_scores(times)
    assert (scores >= 0).all() and (scores <= 1).all()
    rows = np.array(random.sample(range(len(times)), len(times)))  # type: ignore[attr-defined]
    columns = np.array(random.sample(range(times.shape[1]), times.shape[1]))  # type: ignore[attr-defined]
    assert benchmark_scores(times[rows][:, columns]) == pytest.approx(scores[rows])
    assert benchmark_scores(times * unit) == pytest.approx(scores)


@given(tables, st.data())
def test_own_worse_times_never_raise_the_own_score(times: np.ndarray, data: st.DataObject) -> None:
    s = data.draw(st.integers(0, len(times) - 1))
    worse = times.copy()
    worse[s] *= data.draw(arrays(float, times.shape[1], elements=st.floats(1, 10)))
    assert benchmark_scores(worse)[s] <= benchmark_scores(times)[s] + 1e-12


@given(tables)
def test_a_slower_submission_changes_nobodys_score(times: np.ndarray) -> None:
    slower = times.max(axis=0, keepdims=True) * 1.5
    assert benchmark_scores(np.vstack([times, slower]))[:-1] == pytest.approx(benchmark_scores(times))


def trials(rows: list[tuple[str, str, int, int, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["submission", "workload", "study", "trial", "index", "seconds"])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("vw"), st.integers(0, 2), st.integers(1, 3),
                          st.integers(0, 9), st.one_of(st.floats(0.1, 99), st.just(np.nan))),
                min_size=1, max_size=20, unique_by=lambda row: row[:4]), st.randoms())  # fmt: skip
def test_studies_and_medians_do_not_depend_on_the_order_of_the_rows(rows: list, random: object) -> None:  # type: ignore[type-arg]
    table = trials(rows)
    shuffled = trials(random.sample(rows, len(rows)))  # type: ignore[attr-defined]
    for by_index in (False, True):
        expected, actual = (
            times_to_target(study_times(t, "seconds", by_index=by_index), "seconds") for t in (table, shuffled)
        )
        pd.testing.assert_frame_equal(actual, expected)
    best = study_times(table, "seconds").set_index(["submission", "workload", "study"])["seconds"]
    for key, group in table.groupby(["submission", "workload", "study"]):
        assert best[key] == group["seconds"].fillna(INF).min()


def test_algoperf_takes_the_trial_with_the_smallest_index_and_we_the_fastest() -> None:
    table = trials([("a", "w", 0, 1, 5, 100.0), ("a", "w", 0, 2, 3, 120.0), ("a", "w", 0, 3, 3, 110.0)])
    assert study_times(table, "seconds")[["seconds", "row"]].values.tolist() == [[100.0, 0]]
    assert study_times(table, "seconds", by_index=True)[["seconds", "row"]].values.tolist() == [[120.0, 1]]


def test_the_median_over_studies_counts_misses() -> None:
    rows = [("a", "w", i, 1, 0, t) for i, t in enumerate([10.0, np.nan, 30.0])]
    rows += [("b", "w", i, 1, 0, t) for i, t in enumerate([10.0, np.nan, np.nan, 20.0])]
    rows += [("c", "v", 0, 1, 0, 5.0)]
    times = times_to_target(study_times(trials(rows), "seconds"), "seconds")
    assert times.loc["a", "w"] == 30.0 and times.loc["b", "w"] == INF
    assert np.isnan(times.loc["c", "w"]) and times.loc["c", "v"] == 5.0


@pytest.mark.parametrize(
    ("base", "variant", "counts"),
    [
        ([10.0, 20.0], [10.0, 20.0], [True, True]),
        ([10.0, 41.0], [10.0, 20.0], [True, False]),  # too slow on the base
        ([10.0, 20.0], [10.0, 41.0], [True, False]),  # too slow on the variant
        ([10.0, 20.0], [np.nan, 20.0], [False, True]),  # variant not run
        ([INF, 20.0], [1.0, 20.0], [False, True]),  # a variant without its base sets no standard
        ([10.0, 20.0], [np.nan, np.nan], [True, True]),  # nobody ran the variant
    ],
)
def test_a_base_workload_counts_only_with_its_variant(
    base: list[float], variant: list[float], counts: list[bool]
) -> None:
    times = pd.DataFrame({"w": base, "w_tanh": variant}, index=["a", "b"])
    wanted = targets("w", "never_run", held_out=("w_tanh", "w_other"))
    table = qualified(times, wanted)
    assert list(np.isfinite(table["w"])) == counts
    assert np.isinf(table["never_run"]).all()
    assert unscored_held_out(times, wanted) == (["w_tanh", "w_other"] if np.isnan(variant).all() else ["w_other"])
    assert not (disqualified(times, wanted)["w"] & np.isfinite(table["w"])).any()


def test_the_longest_base_name_owns_a_variant() -> None:
    wanted = targets("vit", "vit_large", held_out=("vit_large_glu", "vit_glu"))
    assert wanted.base_of("vit_large_glu") == "vit_large" and wanted.base_of("vit_glu") == "vit"


def test_speedups_say_when_they_are_bounds() -> None:
    times = np.array([[10.0, 10.0], [5.0, 20.0], [5.0, INF], [INF, 5.0], [INF, INF], [np.nan, 5.0]])
    limits = np.full((6, 2), 40.0)
    values, reading = speedups(times, limits, 0)
    assert values == pytest.approx([1, 1, (2 * 0.25) ** 0.5, (0.25 * 2) ** 0.5, 0.25, 2])
    assert reading == ["exact", "exact", "upper bound", "upper bound", "upper bound", "exact"]
    values, reading = speedups(times, limits, 2)  # this baseline misses the second
    assert reading == ["lower bound", "lower bound", "exact", "none", "upper bound", "lower bound"]
    assert values[2] == 1 and np.isnan(values[3])
    assert np.isnan(speedups(times, np.full((6, 2), np.nan), 0)[0][2])


@given(tables)
def test_a_speedup_does_not_move_when_others_enter(times: np.ndarray) -> None:
    limits = np.full(times.shape, 2e6)
    alone = speedups(times[:1], limits[:1], 0)
    assert speedups(times, limits, 0)[1][0] == alone[1][0]
    np.testing.assert_allclose(speedups(times, limits, 0)[0][0], alone[0][0])


def test_the_published_algoperf_scores_come_out_of_the_derived_figures() -> None:
    records = read_trials_table(algoperf.TABLE, algoperf.TARGETS)
    board = score(records, mode="algoperf", baseline="baseline")
    scores = dict(zip(board.scores["submission"], board.scores["score"], strict=True))
    assert {name: round(score, 4) for name, score in scores.items()} == algoperf.PUBLISHED
    ours = score(records, baseline="baseline").scores.set_index("submission")
    assert (ours["score"] - ours["algoperf_score"]).abs().between(1e-4, 0.01).sum() >= 5
