"""Configs of the user's own: folders beside the shipped one, and presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.choices import CONFIG_DIR_VARIABLE, add_user_config_dir, list_choices
from harness.config.compose import expand_sweep, load_run
from harness.errors import UserError

LION = "name: mine\ndescription: mine\npaper: mine\nclass_path: submissions.lion.Lion\npaper_defaults: {lr: 1.0e-3}\n"
LION += "recipe: {hyperparameters: {lr: 2.0e-3}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's with an optimizer and a preset, already added."""
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, "")
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text(LION)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "small.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /workload: gpt2\n  - override /optimizer: mine\n  - _self_\n"
        "seed: 3\nworkload:\n  max_steps: 60\nrecords: 'results/it''s here'\n"
    )
    add_user_config_dir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run(list(arguments))
    return str(caught.value)


def test_an_optimizer_of_the_users_own_is_composed_with_the_shipped_configs(folder: Path) -> None:
    assert "mine" in list_choices("optimizer") and "lion" in list_choices("optimizer")
    run = load_run(["workload=gpt2", "optimizer=mine"])
    assert run.optimizer.name == "mine" and run.optimizer.effective_hyperparameters["lr"] == 2e-3 and run.shipped
    assert expand_sweep(["optimizer=glob(mi*)"]) == [["optimizer=mine"]]


def test_a_name_that_is_shipped_is_refused(folder: Path) -> None:
    (folder / "optimizer" / "lion.yaml").write_text(LION)
    message = refused("workload=gpt2", "optimizer=lion")
    assert "have the same name" in message and str(folder / "optimizer" / "lion.yaml") in message


def test_a_folder_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, "")
    with pytest.raises(UserError, match=r"none of the folders .*belongs into .*optimizer"):
        add_user_config_dir(tmp_path)
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, "")
    with pytest.raises(UserError, match="no such folder"):
        add_user_config_dir(tmp_path / "nothing")


def test_a_path_in_place_of_a_name_says_where_the_file_belongs() -> None:
    assert "add --config-dir FOLDER" in refused("workload=gpt2", "optimizer=conf/mine.yaml")


def test_a_preset_is_a_command_line_over_which_the_arguments_win(folder: Path) -> None:
    run = load_run(["+experiment=small"])
    assert (run.spec.name, run.optimizer.name, run.seed, run.spec.max_steps) == ("gpt2", "mine", 3, 60)
    assert run.modified == ("max_steps",) and str(run.records) == "results/it's here"
    run = load_run(["experiment=small", "optimizer=lion", "seed=4"])
    assert (run.optimizer.name, run.seed, run.spec.max_steps) == ("lion", 4, 60)
    assert load_run(["+experiment=try", "workload=gpt2", "optimizer=lion"]).spec.max_steps == 60
    tuned = load_run(["+experiment=tuned", "workload=gpt2", "optimizer=lion"])
    assert tuned.ruleset.name == "external" and tuned.run_to_end and not tuned.modified


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold `defaults:`"),
        ("defaults: [workload]\n", "must be like `override /workload: gpt2`"),
        ("a: [1\n", "cannot be read"),
        ("workload: {max_stepz: 3}\n", "workload.max_stepz=3: unknown key; did you mean `max_steps`"),
    ],
)
def test_a_broken_preset_is_an_error_that_names_it(folder: Path, text: str, message: str) -> None:
    (folder / "experiment" / "small.yaml").write_text(text)
    assert message in refused("+experiment=small", "workload=gpt2", "optimizer=lion")
    assert "no such preset; did you mean `small`?" in refused("+experiment=smal", "workload=gpt2", "optimizer=lion")
