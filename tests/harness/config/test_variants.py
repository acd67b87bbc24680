"""Held-out variants in configuration, records and plans. Their models: tests/workloads/test_variants.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import choices
from harness.config.choices import list_variants, target_file
from harness.config.compose import expand_sweep, load_run
from harness.config.schema import Run
from harness.errors import UserError
from harness.records.archive import read_archive
from harness.records.layout import RecordPath, folder_of_archive
from harness.seeding import TrialSeeds
from harness.study import ledger
from harness.study.timing_run import measure_timings
from harness.trial.record import Record

ROOT = Path(__file__).parents[3]
BASE = ["workload=gpt2", "optimizer=adamw"]


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_run([*BASE, *arguments])
    return caught.value.messages


def test_a_variant_overrides_what_differs_and_no_more(configs: Path) -> None:
    base, silu = load_run(BASE), load_run([*BASE, "variant=silu"])
    assert (silu.spec.name, silu.spec.variant, silu.spec.full_name) == ("gpt2", "silu", "gpt2_silu")
    assert silu.modified == () and silu.shipped and silu.scale_folder == "mini"
    assert silu.workload["model"] == base.workload["model"] | {"activation": "silu"}
    variant_keys = {"variant", "description", "target", "target_version", "target_provenance", "model"}
    assert {key: v for key, v in silu.workload.items() if key not in variant_keys} == {
        key: v for key, v in base.workload.items() if key not in variant_keys
    }
    assert silu.algorithm() == base.algorithm() and silu.submission_label == "adamw"
    tried = load_run([*BASE, "variant=silu", "workload.max_steps=60"])
    assert tried.modified == ("max_steps",) and tried.scale_folder.startswith("mini-modified-")


def test_the_base_is_named_or_not(configs: Path) -> None:
    named = load_run([*BASE, "variant=base"])
    assert named.identity() == load_run(BASE).identity() and named.spec.full_name == "gpt2"
    assert "variant" not in named.workload


def test_the_provenance_is_the_variants_own(configs: Path) -> None:
    assert load_run(BASE).workload["target_provenance"]["hits"]
    assert load_run([*BASE, "variant=silu"]).workload["target_provenance"] is None
    path = target_file("gpt2", "mini", "silu")
    path.write_text(path.read_text() + "target_provenance: {winner: adamw 3}\n")
    assert load_run([*BASE, "variant=silu"]).workload["target_provenance"] == {"winner": "adamw 3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["variant=sliu"],
            "variant=sliu: workload=gpt2 has no such variant at scale=mini; it has base, res-post-norm, silu",
        ),
        (["variant="], "it has base, res-post-norm, silu"),
        (["variant=map"], "it has base, res-post-norm, silu"),  # it is vit's
        (["variant=silu", "workload.model.activation=tanh"], "'gelu' or 'silu'"),
        (["variant=silu", "workload.variant=a_b"], "workload.variant=a_b"),
        (["variant=silu", "scale=full"], "scale=full"),
        (["variant=silu,base"], "add -m"),
        (["workload.model.norm_placement=post"], "'pre' or 'res-post'"),
    ],
)
def test_each_problem_names_key_and_remedy(configs: Path, arguments: list[str], message: str) -> None:
    assert any(message in line for line in problems(*arguments)), problems(*arguments)


def test_a_target_that_is_not_measured_names_the_command_that_measures_it(configs: Path) -> None:
    (line,) = problems("variant=res-post-norm")
    assert "`python scripts/set_targets.py gpt2 --variant res-post-norm --write`" in line
    assert "workload.target=VALUE" in line
    assert load_run([*BASE, "variant=res-post-norm", "workload.target=1.5"]).modified == ("target",)
    reported = problems("variant=res-post-norm", "workload.max_step=3")
    assert len(reported) == 2 and any("max_steps" in line for line in reported)
    path = target_file("gpt2", "mini")
    path.write_text(re.sub("^target: .*$", "target: ???", path.read_text(), flags=re.MULTILINE))
    assert any("`python scripts/set_targets.py gpt2 --write`" in line for line in problems())
    assert "--scale full --variant x --write" in choices.target_not_measured("gpt2", "full", "x")


def test_variants_sweep_like_any_choice() -> None:
    runs = expand_sweep(["workload=gpt2", "variant=base,silu", "optimizer=adamw"])
    assert [run[1] for run in runs] == ["variant=base", "variant=silu"]


@pytest.mark.parametrize("workload", choices.list_choices("workload"))
def test_every_shipped_variant_is_valid(workload: str) -> None:
    for variant in list_variants(workload, "mini"):
        run = load_run([f"workload={workload}", f"variant={variant}", "optimizer=adamw", "workload.target=1"])
        assert run.spec.variant == variant and set(run.modified) <= {"target"}


def test_records_plans_and_manifests_have_the_full_name(
    configs: Path, trial: Callable[..., Record], tmp_path: Path
) -> None:
    record = trial("variant=silu", "workload.model.activation=silu")
    assert record.folder.parts[-3:] == ("study_0", "gpt2_silu_pytorch", "trial_1")
    manifest = json.loads(record.path.manifest.read_text())
    assert (manifest["workload"], manifest["variant_of"]) == ("gpt2_silu", "gpt2")
    assert manifest["identity"]["workload"]["variant"] == "silu"
    base = trial()
    assert base.folder.parts[-2] == "gpt2_pytorch" and "variant_of" not in base.manifest.model_fields_set
    # Another model on the same seeds: the same examples and, here, the same initial weights.
    assert base.manifest.seeds == manifest["seeds"] == {"study": 0, "trial": 1, "base": TrialSeeds(0, 1).base}
    assert [row["train/loss"] for row in base.rows] != [row["train/loss"] for row in record.rows]

    timed = measure_timings({"adamw": record.run}, rounds=1, seconds_per_segment=0.0)
    assert timed["workload"].tolist() == ["gpt2_silu"]
    runs = [load_run([*BASE, f"variant={v}", f"records={tmp_path / 'planned'}"]) for v in ("base", "silu")]
    entries = ledger.plan(runs, "m")
    assert {entry.name for entry in entries} == {f"adamw on {w}, study 0, trial 1" for w in ("gpt2", "gpt2_silu")}
    assert {p.name for p in tmp_path.glob("planned/*/*/*/*/*")} == {"plan_gpt2.json", "plan_gpt2_silu.json"}
    assert {e.path.folder for e in ledger.list_all_trials(tmp_path / "planned")[0]} == {
        RecordPath.of_run(run, "m").folder for run in runs
    }


def test_committed_records_are_still_those_of_their_runs() -> None:
    """A committed record is continued, or found finished, by a run with the same identity in its folder."""
    archives = sorted(ROOT.glob("results/*/records/**/*.tar.xz"))
    assert archives
    contents = {path.parent: path.read_bytes() for path in ROOT.glob("results/*/records/**/manifest.json")}
    for archive in archives:
        trials = read_archive(archive).trials
        contents |= {folder_of_archive(archive) / name: trial.files["manifest.json"] for name, trial in trials.items()}
    changed = []
    for folder, content in contents.items():
        manifest = json.loads(content)
        run = Run(**manifest["config"], overwrite=False, debug=False)
        record = RecordPath.parse(folder)
        assert record is not None, folder
        labelled = run.model_copy(update={"records": record.records, "label": record.label})
        same = (
            json.loads(json.dumps(run.identity())) == manifest["identity"]
            and RecordPath.of_run(labelled, record.machine).folder == folder
            and run.spec.full_name == manifest["workload"]
            and TrialSeeds(run.seed, run.trial).base == manifest["seeds"]["base"]
        )
        if not same:
            changed.append(folder)
    assert changed == []


@pytest.mark.parametrize("workload", choices.list_choices("workload"))
def test_a_base_workload_says_nothing_of_variants(workload: str) -> None:
    """Its identity, its manifest and its plan hold what its config gives, key by key."""
    run = load_run([f"workload={workload}", "optimizer=adamw"])
    options = {
        "gpt2": "vocabulary context layers width heads dropout",
        "resnet": "channels classes width stages stem bn_momentum",
        "vit": "image channels classes patch layers width heads dropout pooling",
    }
    assert set(run.identity()["workload"]["model"]) == set(options[workload].split())
    assert "variant" not in json.dumps(run.model_dump(mode="json", exclude={"workload": {"target_provenance"}}))
