"""The procedure of recipes, on trials of a second and in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from harness.config.choices import config_files
from harness.config.compose import load_run
from harness.errors import UserError
from harness.study import recipe_procedure
from harness.study.executors import Report
from harness.study.ledger import PlannedTrial
from harness.study.recipe_procedure import PRESENT, SEED, recipe_file, tune_recipes, write_recipe
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2
from tests.processes import call

# A target that some points reach in these few steps and others do not.
TINY = [argument for argument in TINY_GPT2 if not argument.startswith(("workload=", "workload.target="))]
TINY.append("workload.target=5.0")


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the trials that the procedure has run, which is done in this process."""
    names: list[str] = []

    def execute(entries: Sequence[PlannedTrial], report: Report) -> None:
        for entry in entries:
            if not entry.path.evaluations.exists():
                names.append(entry.name)
                run_trial(entry.run)

    monkeypatch.setattr(recipe_procedure.executors, "execute", execute)
    return names


def test_the_best_candidate_becomes_the_recipe(configs: Path, tmp_path: Path, executed: list[str]) -> None:
    arguments = [*TINY, f"records={tmp_path / 'records'}", "machine=m"]

    def tune() -> recipe_procedure.TunedRecipe:
        (tuned,) = tune_recipes(["lion"], ["gpt2"], 3, arguments, "m", lambda line: None)
        return tuned

    tuned = tune()
    assert len(executed) == 4
    assert {candidate.name for candidate in tuned.candidates} == {PRESENT, "1", "2", "3"}
    assert [candidate.cost for candidate in tuned.candidates] == sorted(c.cost for c in tuned.candidates)
    for candidate in tuned.candidates:
        outcome = candidate.outcomes["gpt2"]
        assert (candidate.cost <= 1) == outcome.endswith("steps")
    tune()
    assert len(executed) == 4  # the finished trials are read
    path = recipe_file("lion")
    before = yaml.safe_load(path.read_text())
    write_recipe(path, tuned)
    written = yaml.safe_load(path.read_text())
    assert written["recipe_provenance"]["chosen"] == tuned.best.name and written["recipe_provenance"]["seed"] == SEED
    assert {key for key in written if written[key] != before.get(key)} <= {"recipe", "recipe_provenance"}
    # As run.py composes it, it is the candidate to three digits.
    run = load_run(["workload=gpt2", "optimizer=lion"])
    chosen = tuned.best.run.optimizer.effective_hyperparameters
    assert run.optimizer.effective_hyperparameters["lr"] == pytest.approx(chosen["lr"], rel=5e-3)
    assert run.schedule.warmup_fraction == pytest.approx(tuned.best.run.schedule.warmup_fraction, rel=5e-3)
    assert run.identity()["optimizer"].get("recipe_provenance") is None
    # Written twice, it stands there once.
    write_recipe(path, tuned)
    assert path.read_text().count("recipe_provenance:") == 1


def test_the_present_recipe_stays_where_nothing_is_better(
    configs: Path, tmp_path: Path, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal ones too: every trial here has the same cost."""
    monkeypatch.setattr(recipe_procedure, "_judge", lambda trial: (0.5, "8 steps"))
    monkeypatch.setattr(recipe_procedure.executors, "execute", lambda trials, report: None)
    arguments = [*TINY, f"records={tmp_path / 'records'}", "machine=m"]
    (tuned,) = tune_recipes(["adamw"], ["gpt2"], 2, arguments, "m", lambda line: None)
    assert tuned.best.name == PRESENT
    before = yaml.safe_load(recipe_file("adamw").read_text())
    write_recipe(recipe_file("adamw"), tuned)
    written = yaml.safe_load(recipe_file("adamw").read_text())
    assert written["recipe"] == before["recipe"]
    assert written["recipe_provenance"]["outcomes"] == {"gpt2": "8 steps"}


def test_a_yaml_without_a_recipe_is_refused(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_procedure, "_judge", lambda trial: (0.5, "8 steps"))
    monkeypatch.setattr(recipe_procedure.executors, "execute", lambda trials, report: None)
    arguments = [*TINY, f"records={tmp_path / 'records'}", "machine=m"]
    (tuned,) = tune_recipes(["adamw"], ["gpt2"], 1, arguments, "m", lambda line: None)
    (path,) = config_files("optimizer", "adamw")
    path.write_text(path.read_text().replace("recipe:", "recept:"))
    with pytest.raises(UserError, match="has no block `recipe:` with keys below it"):
        write_recipe(path, tuned)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["lio"], "lio: no submission has this name; did you mean `lion`"), (["lion", "--points", "0"], "give 1 or more")],
)
def test_bad_arguments(arguments: list[str], expected: str) -> None:
    done = call("tune_recipes", *arguments)
    assert done.returncode == 2 and expected in done.stderr
