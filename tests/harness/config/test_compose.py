from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.choices import list_choices
from harness.config.compose import expand_sweep, load_run
from harness.errors import UserError

BASE = ["workload=gpt2", "optimizer=adamw"]


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_run(list(arguments))
    return caught.value.messages


def test_every_problem_is_reported_at_once() -> None:
    reported = problems(
        *BASE, "workload.max_step=3", "workload.model.widht=3", "sede=1", "precision=fp8", "workload.nominal_batch=0",
        "optimizer.hyperparameters.lrr=1", "optimizer.hyperparameters.betas=[0.9,1.5]", "optimizer.no_decay=[nrom]",
        "schedule.horizon_fraction=1.5",
    )  # fmt: skip
    for key, remedy in [
        ("workload.max_step=3", "max_steps"), ("workload.model.widht=3", "width"), ("sede=1", "seed"),
        ("precision=fp8", "fp32"), ("workload.nominal_batch=0", "greater than"), ("hyperparameters.lrr=1", "lr"),
        ("hyperparameters.betas=[0.9, 1.5]", "[0, 1)"), ("no_decay=nrom", "norm"),
        ("schedule.horizon_fraction=1.5", "less than or equal to 1"),
    ]:  # fmt: skip
        assert any(key in line and remedy in line for line in reported), (key, reported)
    assert len(reported) == 9


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["workload=gtp2", "optimizer=nadamv"], ["did you mean `gpt2`", "did you mean `nadamw`"]),
        (["workload=gpt2"], ["optimizer is not given"]),
        ([*BASE, "scale=huge"], ["scale=huge"]),
        ([*BASE, "seed=1,2"], ["add -m"]),
        ([*BASE, "nonsense"], ["write key=value"]),
        ([*BASE, "~seed"], ["cannot be removed"]),
        ([*BASE, "optimizer.hyperparameters.lr=-1"], ["lr=-1: must be above 0"]),
        ([*BASE, "optimizer.hyperparameters.lr=fast"], ["lr=fast: must be a number"]),
        ([*BASE, "optimizer.hyperparameters.lr=nan"], ["must be finite"]),
        ([*BASE, "optimizer.hyperparameters.fused=yes_please"], ["fused=yes_please: must be true or false"]),
        ([*BASE, "optimizer.clip_norm=-1"], ["optimizer.clip_norm=-1: must be greater than 0"]),
        ([*BASE, "schedule=wsd", "schedule.decay_fraction=0.95"], ["lower one"]),
        ([*BASE, "workload.micro_batch=5"], ["whole micro-batches"]),
        ([*BASE, "workload.model.heads=5"], ["width=64 must be a multiple of heads=5"]),
        (["workload=gpt2", "optimizer=any"], ["optimizer.class_path is not given"]),
        (["workload=gpt2", "optimizer=any", "optimizer.class_path=torch.optim.Adma"], ["did you mean `Adam"]),
        (["workload=gpt2", "optimizer=any", "optimizer.class_path=no.such.Class"], ["is its package installed"]),
        (["workload=gpt2", "optimizer=any", "optimizer.class_path=torch.nn.Linear"], ["neither"]),
        (
            ["workload=gpt2", "optimizer=any", "optimizer.class_path=torch.optim.Rprop",
             "optimizer.hyperparameters.etas=[2,3]"],
            ["Rprop refuses them"],
        ),
        ([*BASE, "workload.model=x"], ["workload.model=x: must be a mapping"]),
        ([*BASE, "workload.data=null"], ["workload.data=None: must be a mapping"]),
        ([*BASE, "workload.class_path=subprocess.Popen"], ["subprocess.Popen: this is no workload"]),
        ([*BASE, "optimizer.class_path=..x.Y"], ["optimizer.class_path=..x.Y: write the full import path"]),
        ([*BASE, "ruleset.budget_factor=inf"], ["ruleset.budget_factor=inf: must be finite"]),
        ([*BASE, "ruleset.budget_factor=1e300"], ["ruleset.budget_factor=1e+300: must be at most"]),
        ([*BASE, "workload.target=nan"], ["workload.target=nan: must be finite"]),
        ([*BASE, "workload.target=inf"], ["workload.target=inf: must be finite"]),
        ([*BASE, "workload.max_steps=99999999999999999999"], ["max_steps=99999999999999999999: must be at most"]),
        ([*BASE, "workload.max_steps=1e20"], ["workload.max_steps=1e+20: "]),
        ([*BASE, "threads=100000"], ["threads=100000: must be at most 4096"]),
        ([*BASE, "executor.workers=1000000"], ["executor.workers=1000000: must be at most 10000"]),
        ([*BASE, "ruleset.studies=100000", "ruleset.trials=100000"], ["a command has at most 100000 trials"]),
        ([*BASE, "seed=2147483647", "ruleset.studies=3"], ["seed=2147483647: the seeds of 3 studies"]),
        ([*BASE, "checkpoint_seconds=inf"], ["checkpoint_seconds=inf: must be finite"]),
        ([*BASE, "optimizer.clip_norm=inf"], ["optimizer.clip_norm=inf: must be finite"]),
        ([*BASE, "data=${nothere}"], ["data=${nothere}: does not resolve", "give the value itself"]),
        ([*BASE, "data=${oc.env:NOPE}"], ["data=${oc.env:NOPE}: does not resolve"]),
        ([*BASE, "optimizer.recipe=3"], ["optimizer.recipe=3: does not resolve"]),
        ([*BASE, "key@x=1"], ["key@x=1: there are no packages (`@`) here; write key=VALUE"]),
        ([*BASE, f"label={'x' * 300}"], ["300 characters; a name of a folder has at most"]),
    ],
)  # fmt: skip
def test_each_problem_names_key_and_remedy(arguments: list[str], expected: list[str]) -> None:
    reported = problems(*arguments)
    for text in expected:
        assert any(text in line for line in reported), reported


def test_labels_tell_configurations_apart() -> None:
    def label(*arguments: str) -> str:
        return load_run([*BASE, *arguments]).submission_label

    assert label() == "adamw"
    assert label("optimizer.hyperparameters.lr=0.012") == "adamw"  # the recipe's own value
    others = [
        label("optimizer.hyperparameters.lr=0.5"),
        label("schedule=cosine"),
        label("schedule.horizon_fraction=0.5"),
    ]
    assert len({"adamw", *others}) == 4 and all(other.startswith("adamw-") for other in others)
    assert label("label=mine") == "mine"
    assert label("seed=3", "threads=2", "records=/elsewhere") == "adamw"


def test_a_changed_workload_is_marked_and_kept_apart() -> None:
    run = load_run([*BASE, "workload.max_steps=60", "workload.model.layers=1"])
    assert run.modified == ("max_steps", "model.layers")
    assert run.scale_folder.startswith("mini-modified-")
    assert load_run(BASE).scale_folder == "mini" and load_run(BASE).modified == ()
    assert run.scale_folder != load_run([*BASE, "workload.max_steps=61", "workload.model.layers=1"]).scale_folder


def test_another_budget_is_marked_and_what_prevents_a_comparison_is_in_the_folder() -> None:
    run = load_run([*BASE, "ruleset.budget_factor=3"])
    assert run.modified == ("ruleset.budget_factor",) and run.scale_folder.startswith("mini-modified-")
    # The ruleset's own is none.
    assert load_run([*BASE, "ruleset=self_tuning"]).modified == ()
    assert load_run([*BASE, "precision=bf16", "compile=true"]).scale_folder == "mini-bf16-compiled"
    assert load_run([*BASE, "deterministic=false"]).scale_folder == "mini-nondeterministic"


def test_the_name_of_another_submission_is_no_label() -> None:
    with pytest.raises(UserError, match="label=muon: the name of another submission"):
        load_run([*BASE, "label=muon"])
    assert load_run([*BASE, "label=adamw"]).submission_label == "adamw"


def test_the_recipe_wins_over_the_paper_and_the_user_over_the_recipe() -> None:
    optimizer = load_run([*BASE, "optimizer.hyperparameters.weight_decay=0.3"]).optimizer
    assert optimizer.effective_hyperparameters["lr"] == optimizer.recipe.hyperparameters["lr"]
    assert optimizer.effective_hyperparameters["weight_decay"] == 0.3
    assert optimizer.effective_hyperparameters["eps"] == optimizer.paper_defaults["eps"]
    assert load_run(BASE).schedule.horizon_fraction == optimizer.recipe.horizon_fraction


@pytest.mark.parametrize("workload", list_choices("workload"))
@pytest.mark.parametrize("schedule", list_choices("schedule"))
def test_every_workload_goes_with_every_schedule(workload: str, schedule: str) -> None:
    run = load_run([f"workload={workload}", "optimizer=adamw", f"schedule={schedule}"])
    assert run.modified == () and run.schedule.shape == ("linear" if schedule == "recipe" else schedule)


def test_the_recipe_names_the_schedule_unless_the_user_does() -> None:
    recipe = ["optimizer.recipe.schedule=constant"]
    assert load_run([*BASE, *recipe]).schedule.shape == "constant"
    assert load_run([*BASE, *recipe, "schedule=cosine"]).schedule.shape == "cosine"


def test_what_a_submission_does_not_use_is_not_part_of_its_identity() -> None:
    """Records from before there were wrappers and other schedules continue."""
    algorithm = load_run(BASE).algorithm()
    assert "wrappers" not in algorithm["optimizer"] and set(algorithm["schedule"]) == {
        "shape", "warmup_fraction", "horizon_fraction", "final_fraction", "decay_fraction",
    }  # fmt: skip


def test_a_sweep_takes_all_that_a_glob_matches() -> None:
    runs = expand_sweep(["workload=gpt2", "optimizer=glob([*lion*,mu*],exclude=lion)"])
    optimizers = [run[1] for run in runs]
    assert {"optimizer=cautious_lion", "optimizer=lion_k", "optimizer=muon"} < set(optimizers)
    assert "optimizer=lion" not in optimizers and optimizers == sorted(optimizers)
    for argument in ("optimizer=glob(none*)", "seed=glob(*)"):
        with pytest.raises(UserError, match="matches nothing"):
            expand_sweep([argument])


def test_sweeps_expand_in_order() -> None:
    runs = expand_sweep(["workload=gpt2,vit", "optimizer=adamw", "seed=range(0,2)"])
    assert runs == [
        ["workload=gpt2", "optimizer=adamw", "seed=0"], ["workload=gpt2", "optimizer=adamw", "seed=1"],
        ["workload=vit", "optimizer=adamw", "seed=0"], ["workload=vit", "optimizer=adamw", "seed=1"],
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=25), max_size=3))
def test_no_command_line_crashes(arguments: list[str]) -> None:
    try:
        load_run([*BASE, *arguments])
    except UserError as error:
        assert error.messages and all("Traceback" not in line for line in error.messages)


def test_help_does_not_load_torch() -> None:
    code = "import sys, run; run.main(['--help']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("gpt2", "lion", "cosine", "wandb"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("seed=interval(0,1)", "an interval cannot be run in full"),
        ("seed=range(0,1e400)", "more than 10000 values"),
        ("seed=range(0,1000000000)", "more than 10000 values"),
        ("seed=shuffle(range(0,1000000000))", "more than 10000 values"),
        ("seed=range(0,3,0)", "more than 10000 values"),
    ],
)
def test_a_sweep_without_end_is_refused(argument: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        expand_sweep([*BASE, argument])
