from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.choices import TEMPLATES, list_choices
from harness.config.compose import load_run
from harness.config.search_space import Dimension, parse_search_space
from harness.config.study_trials import configure_trial
from harness.errors import UserError

RANGES: dict[str, Any] = {
    "hyperparameters": {
        "lr": {"log": [1e-4, 1e-1]},
        "betas": [{"one_minus_log": [0.8, 0.98]}, {"linear": [0.9, 0.999]}],
        "steps": {"integer": [1, 5]},
    },
    "warmup_fraction": {"choices": [0.0, 0.02, 0.1]},
}
# As ruleset=external, over the composition that other tests of every submission use too.
TUNED = ["ruleset.points=search_space", "ruleset.studies=3", "ruleset.trials=5"]
LIST = {"points": [{"hyperparameters": {"lr": 10.0**-i}} for i in range(6)]}


def problems(raw: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_search_space(raw)
    return caught.value.messages


@given(study=st.integers(0, 2**31 - 1), trial=st.integers(1, 200))
def test_points_lie_in_the_space_and_have_its_shape(study: int, trial: int) -> None:
    point = parse_search_space(RANGES).point("mine", study, trial)
    sampled = point["hyperparameters"]
    assert 1e-4 <= sampled["lr"] <= 1e-1
    assert 0.8 <= sampled["betas"][0] <= 0.98 and 0.9 <= sampled["betas"][1] <= 0.999 and len(sampled["betas"]) == 2
    assert sampled["steps"] in range(1, 6) and isinstance(sampled["steps"], int)
    assert point["warmup_fraction"] in (0.0, 0.02, 0.1)


@given(raw=st.sampled_from([RANGES, LIST]), study=st.integers(0, 100))
def test_a_point_is_a_pure_function_of_submission_study_and_trial(raw: dict[str, Any], study: int) -> None:
    space = parse_search_space(raw)
    forwards = [space.point("mine", study, trial) for trial in range(1, 7)]
    backwards = [parse_search_space(raw).point("mine", study, trial) for trial in range(6, 0, -1)]
    assert forwards == backwards[::-1]
    assert len({json.dumps(point) for point in forwards}) == 6
    assert forwards != [space.point("mine", study + 1, trial) for trial in range(1, 7)]
    assert forwards != [space.point("yours", study, trial) for trial in range(1, 7)]


def test_another_process_draws_the_same_points() -> None:
    """Python's own hash differs from process to process."""
    module = "from harness.config.search_space import parse_search_space"
    code = f"{module}; print(parse_search_space({RANGES!r}).point('mine', 3, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(parse_search_space(RANGES).point("mine", 3, 2))


def test_the_order_of_the_yaml_does_not_matter() -> None:
    turned = dict(reversed(RANGES.items())) | {"hyperparameters": dict(reversed(RANGES["hyperparameters"].items()))}
    assert parse_search_space(turned).point("mine", 0, 4) == parse_search_space(RANGES).point("mine", 0, 4)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("linear", 2.0, 10.0), ("log", 1e-3, 1.0), ("one_minus_log", 0.9, 0.999)]
)
def test_points_are_spread_evenly_over_the_scale_of_the_range(kind: str, low: float, high: float) -> None:
    """Of 32 scrambled Sobol points, every dyadic interval of 1/32 holds exactly one."""
    space = parse_search_space({"hyperparameters": {"x": {kind: [low, high]}, "y": {"linear": [0, 1]}}})
    scale = {"linear": lambda v: v, "log": math.log, "one_minus_log": lambda v: math.log1p(-v)}[kind]
    values = [space.point("mine", 5, trial)["hyperparameters"]["x"] for trial in range(1, 33)]
    shares = [(scale(value) - scale(low)) / (scale(high) - scale(low)) for value in values]
    assert sorted(int(share * 32) for share in shares) == list(range(32))


@given(st.floats(0, 1, exclude_max=True))
def test_a_choice_and_an_integer_take_every_value_in_equal_shares(u: float) -> None:
    assert Dimension(("x",), "choices", ("a", "b", "c", "d")).value(u) == "abcd"[int(4 * u)]
    assert Dimension(("x",), "integer", (3, 6)).value(u) == 3 + int(4 * u)


def test_every_point_of_a_list_is_tried_once_a_study() -> None:
    space = parse_search_space(LIST)
    for study in (0, 1):
        points = [space.point("mine", study, trial) for trial in range(1, 7)]
        assert sorted(points, key=str) == sorted(LIST["points"], key=str)
    with pytest.raises(UserError, match=r"lists 6 points.*ruleset.trials=6"):
        space.point("mine", 0, 7)


def test_corners_hold_both_ends_and_every_choice() -> None:
    corners = list(parse_search_space(RANGES).corners())
    assert {point["hyperparameters"]["lr"] for point in corners} == {1e-4, 1e-1}
    assert {point["warmup_fraction"] for point in corners} == {0.0, 0.02, 0.1}


def test_one_of_a_list_may_keep_its_value() -> None:
    space = parse_search_space({"hyperparameters": {"betas": [0.9, {"one_minus_log": [0.9, 0.99]}]}})
    assert space.point("mine", 0, 1)["hyperparameters"]["betas"][0] == 0.9


def _space(**hyperparameters: Any) -> dict[str, Any]:
    return {"hyperparameters": hyperparameters}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (_space(lr={"log": [0.1, 0.1]}), "lr.log=[0.1, 0.1]: empty"),
        (_space(lr={"linear": [2, 1]}), "lr.linear=[2, 1]: empty"),
        (_space(lr={"log": [-1e-3, 1e-1]}), "must stay above 0"),
        (_space(lr={"log": [0.0, 1e-1]}), "must stay above 0"),
        (_space(b={"one_minus_log": [0.9, 1.0]}), "1 - value must stay above 0"),
        (_space(k={"integer": [1, 2.5]}), "whole numbers"),
        (_space(lr={"log": [1e-3, float("inf")]}), "two finite numbers"),
        (_space(lr={"log": [1e-3]}), "two finite numbers"),
        (_space(lr={"log": "wide"}), "must be a list"),
        (_space(lr={"logarithmic": [1, 2]}), "must be one range"),
        (_space(lr=0.1), "must be one range"),
        (_space(a={"choices": []}), "must be a list"),
        (_space(a={"choices": [1, 1]}), "is listed twice"),
        ({"hyperparamters": {"lr": {"log": [1e-3, 1]}}}, "did you mean `hyperparameters`"),
        ({}, "must be a mapping"),
        ([1, 2], "must be a mapping"),
        ({"points": []}, "must be a list of points"),
        ({"points": [{"lr": 0.1}]}, "points[0].lr: unknown key"),
        ({"points": [{"clip_norm": 1.0}, {"clip_norm": 1.0}]}, "is listed twice"),
        ({"points": [{"clip_norm": 1.0}], "clip_norm": {"choices": [1]}}, "points and ranges"),
    ],
)
def test_each_problem_names_the_range_and_the_remedy(raw: Any, expected: str) -> None:
    assert any(expected in line for line in problems(raw)), problems(raw)


def test_all_problems_of_a_space_are_reported_at_once() -> None:
    assert len(problems(_space(lr={"log": [1, 0]}, b={"linear": [3, 2]}, c=4))) == 3


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("{hyperparameters: {lrr: {log: [1e-3, 1]}}}", "lrr"),
        ("{hyperparameters: {lr: {linear: [-1, 1]}}}", "lr=-1: must be above 0"),
        ("{points: [{hyperparameters: {lrr: 1}}]}", "did you mean `lr`"),
        ("{horizon_fraction: {linear: [0.5, 1.5]}}", "less than or equal to 1"),
        ("{clip_norm: {linear: [-1.0, 1.0]}}", "greater than 0"),
    ],
)
def test_a_space_is_checked_against_the_submission(space: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(["workload=gpt2", "optimizer=adamw", f"optimizer.search_space={space}"])
    assert any("optimizer.search_space" in line and expected in line for line in caught.value.messages)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimizer=any", "optimizer.class_path=torch.optim.Adam"], "ruleset=quick"),
        (["optimizer=adamw", "optimizer.search_space={points: [{clip_norm: 1.0}]}"], "lists 1 points"),
    ],
)
def test_a_ruleset_asks_for_no_more_than_the_space_has(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_run(["workload=gpt2", "ruleset=external", *arguments])


def test_what_the_user_sets_stays_as_it_is_at_every_point() -> None:
    run = load_run(["workload=gpt2", "optimizer=adamw", "ruleset=external", "optimizer.hyperparameters.lr=0.5",
                "schedule.horizon_fraction=0.9"])  # fmt: skip
    trials = [configure_trial(run, 0, number) for number in range(1, 6)]
    assert {trial.optimizer.effective_hyperparameters["lr"] for trial in trials} == {0.5}
    assert {trial.schedule.horizon_fraction for trial in trials} == {0.9}
    assert len({trial.optimizer.effective_hyperparameters["weight_decay"] for trial in trials}) == 5
    assert {trial.submission_label for trial in trials} == {run.submission_label}


@pytest.mark.xdist_group("submissions")
@pytest.mark.parametrize("name", list_choices("optimizer"))
def test_the_space_of_every_submission_is_sound(name: str) -> None:
    if name in TEMPLATES:
        return
    run = load_run(["workload=gpt2", f"optimizer={name}", *TUNED])
    points = [configure_trial(run, study, trial).algorithm() for study in range(3) for trial in range(1, 6)]
    assert len({json.dumps(point) for point in points}) == 15
