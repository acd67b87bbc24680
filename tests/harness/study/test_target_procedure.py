"""The procedure of targets, on trials of a second and in this process."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from harness.config import study_trials
from harness.config.choices import target_file
from harness.config.compose import load_run
from harness.errors import UserError
from harness.hashing import stable_hash
from harness.interface.workload import WorkloadSpec
from harness.records.evaluations import Evaluations
from harness.records.layout import list_submission_folders
from harness.records.packing import pack
from harness.study import ledger, target_procedure
from harness.study.executors import Report
from harness.study.ledger import PlannedTrial
from harness.study.target_procedure import MeasuredTarget, measure_target, measure_variant_target, write_target
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2

Procedure = tuple[str, list[str], str, Report]
TINY = [argument for argument in TINY_GPT2 if not argument.startswith(("workload=", "workload.target="))]


@pytest.fixture
def tiny(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Procedure:
    """scale, arguments, machine and say of a procedure of two submissions with two points each and three finals."""

    def execute(entries: Sequence[PlannedTrial], report: Report) -> None:
        for entry in entries:
            run_trial(entry.run)

    monkeypatch.setattr(target_procedure.executors, "execute", execute)
    monkeypatch.setattr(target_procedure, "SUBMISSIONS", {"adamw": ["optimizer=adamw"], "nesterov": ["optimizer=sgd"]})
    monkeypatch.setattr(target_procedure, "FINALIST_RUNS", 3)
    grid = ["ruleset.trials=2" if a.startswith("ruleset.trials") else a for a in target_procedure.GRID]
    monkeypatch.setattr(target_procedure, "GRID", grid)
    return "mini", [*TINY, f"records={tmp_path / 'records'}", "machine=m"], "m", lambda line: None


def one_row(step: float, value: float) -> Evaluations:
    """The rows of a trial with one evaluation, which took a quarter of the wall time."""
    further = {"evaluation": np.array([1.0]), "total": np.array([4.0])}
    return Evaluations(np.array([0]), np.array([1.0]), np.array([float(step)]), np.array([value]), further)


@pytest.fixture
def base(tiny: Procedure) -> MeasuredTarget:
    """gpt2 as if measured, and written down; nothing is trained for it."""

    def value(entry: PlannedTrial, facts: WorkloadSpec) -> float:
        return 1.2 + (stable_hash(entry.name) % 1000) / 1e4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_procedure, "_run_all", lambda runs, machine, report: ledger.plan(runs, machine))
        patch.setattr(target_procedure, "_final_value", value)
        patch.setattr(target_procedure, "_read_rows", lambda trial, spec: one_row(step=9, value=1.0))
        measured = measure_target("gpt2", *tiny)
    write_target(target_file("gpt2", "mini"), measured)
    return measured


def test_the_procedure_reads_the_target_off_its_records_and_finds_them_again(
    tiny: Procedure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_procedure, "CONFIRM_RUNS", 4)
    scale, arguments, machine, report = tiny
    measured = measure_target("gpt2", scale, arguments, machine, report)
    manifests = [json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")]
    extra = len(set(measured.provenance["baselines"]) - set(measured.provenance["finalists"]))
    assert Counter(m["identity"]["workload"]["max_steps"] for m in manifests) == {9: 2 * 2 + (2 + extra) * 3, 12: 4}
    assert all(m["status"] == "exhausted" for m in manifests)
    finalists = measured.provenance["finalists"]
    medians = []
    for name, finalist in finalists.items():
        own_records = [
            m
            for m in manifests
            if m["submission"] == name.replace(" ", "-") and m["config"]["workload"]["max_steps"] == 9
        ]
        values = [m["final"]["final_validation/loss"] for m in sorted(own_records, key=lambda m: m["seeds"]["study"])]
        assert finalist["final_values"] == [round(value, 4) for value in values]
        medians.append(statistics.median(values))
    assert medians == sorted(medians) and measured.target == round(medians[0], 4)
    baselines = {name: baseline["final_values"] for name, baseline in measured.provenance["baselines"].items()}
    assert set(baselines) == {"adamw 1", "adamw 2"}
    assert measured.provenance["baseline"] == min(baselines, key=lambda name: statistics.median(baselines[name]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert str(measure_target("gpt2", scale, arguments, machine, report)) == str(
        measured
    )  # NaN among the figures is no change
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # From packed records too, without a further trial.
    archives = [pack(folder) for folder in list_submission_folders(tmp_path / "records")]
    lines: list[str] = []
    assert str(measure_target("gpt2", scale, arguments, machine, lines.append)) == str(measured)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sum(line.startswith("unpacked ") for line in lines) == len(archives) > 4


def test_a_config_without_a_place_for_the_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "workload.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(UserError, match="target_version"):
        write_target(path, MeasuredTarget(0.1, True, True, {}))
    assert path.read_text() == "name: mine\n"


def test_what_is_written_is_what_was_measured(base: MeasuredTarget) -> None:
    written = yaml.safe_load(target_file("gpt2", "mini").read_text())
    assert written["target"] == base.target and written["target_provenance"] == base.provenance
    assert base.accepted and base.quiet and base.verdict == "accepted"
    assert len(base.provenance["grid"]) == 4 and base.provenance["hits"] == "30/30"
    best = list(base.provenance["grid"])[:2]
    assert set(base.provenance["finalists"]) == set(best) and base.provenance["winner"] in best


@pytest.mark.parametrize(
    ("misses", "spread", "verdict"),
    [(0, 4, "accepted"), (0, 6, "NOT quiet"), (1, 4, "NOT quiet"), (3, 4, "NOT quiet"), (4, 4, "REJECTED")],
)
def test_what_a_workload_must_show(
    tiny: Procedure, misses: int, spread: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thirty, at most three may miss; an instrument has no miss and varies by at most 5%."""

    def rows(entry: PlannedTrial, spec: WorkloadSpec) -> Evaluations:
        number = entry.path.study - target_procedure.CONFIRM_SEED
        # They deviate by `spread` percent, and a little more for the 29 degrees of freedom.
        step = 100 + (spread if number % 2 else -spread)
        return one_row(step, 9.9 if number < misses else 1.0)

    monkeypatch.setattr(target_procedure, "_run_all", lambda runs, machine, report: ledger.plan(runs, machine))
    monkeypatch.setattr(target_procedure, "_final_value", lambda trial, spec: 1.2)
    monkeypatch.setattr(target_procedure, "_read_rows", rows)
    measured = measure_target("gpt2", *tiny)
    assert verdict in measured.verdict and (verdict == "accepted") == measured.quiet
    assert measured.accepted == (misses <= 3)
    assert measured.provenance["hits"] == f"{30 - misses}/30"


def test_the_interval_of_the_variation_covers_it() -> None:
    draws = np.random.default_rng(0).normal(100, 5, (2000, 30))
    ends = [target_procedure._coefficient_of_variation(list(row))[1] for row in draws]
    assert 0.93 < np.mean([low < 0.05 < high for low, high in ends]) < 0.97


def test_a_variant_takes_the_finalists_of_its_workload(tiny: Procedure, base: MeasuredTarget, tmp_path: Path) -> None:
    scale, arguments, machine, _ = tiny
    lines: list[str] = []
    again = ("gpt2", "res-post-norm", scale, arguments, machine, lines.append)
    measured = measure_variant_target(*again)
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("records/**/manifest.json")]
    assert len(manifests) == 2 * 3 and {m["workload"] for m in manifests} == {"gpt2_res-post-norm"}
    seeds = range(target_procedure.VARIANT_SEED, target_procedure.VARIANT_SEED + 3)
    assert {m["seeds"]["study"] for m in manifests} == set(seeds)
    assert all(m["identity"]["workload"]["model"]["norm_placement"] == "res-post" for m in manifests)
    # The very points of the base, over the same share of the budget.
    assert {m["identity"]["workload"]["max_steps"] for m in manifests} == {9}
    finalists, of_variant = base.provenance["finalists"], measured.provenance["finalists"]
    assert {name: f["hyperparameters"] for name, f in of_variant.items()} == {
        name: f["hyperparameters"] for name, f in finalists.items()
    }
    assert {f"{m['hyperparameters']['lr']:.4g}" for m in manifests} == {
        f"{f['hyperparameters']['lr']:.4g}" for f in finalists.values()
    }
    medians = {name: sorted(f["final_values"])[1] for name, f in of_variant.items()}
    assert measured.target == min(medians.values()) == medians[measured.provenance["winner"]]
    assert measured.accepted and measured.quiet is None and "median" in measured.verdict
    assert len([line for line in lines if line.startswith("gpt2_res-post-norm finalist")]) == 2
    assert measure_variant_target(*again) == measured  # from the records

    write_target(target_file("gpt2", "mini", "res-post-norm"), measured)
    run = load_run(["workload=gpt2", "variant=res-post-norm", "optimizer=adamw"])
    assert (run.spec.target, run.spec.target_version, run.modified) == (measured.target, 1, ())
    assert run.spec.target_provenance == measured.provenance


def test_a_search_space_that_has_changed_is_noticed(tiny: Procedure, base: MeasuredTarget) -> None:
    path = target_file("gpt2", "mini")
    path.write_text(path.read_text().replace("warmup_fraction: 0.", "warmup_fraction: 0.9", 1))
    with pytest.raises(UserError, match=r"another point now \(warmup_fraction.*set_targets.py gpt2 --scale mini"):
        measure_variant_target("gpt2", "silu", *tiny)


@pytest.mark.parametrize("value", [float("nan"), 1.5])
def test_finalists_that_diverge_give_no_target(
    tiny: Procedure, base: MeasuredTarget, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One diverged run of three is the worst of them; two leave no median."""
    monkeypatch.setattr(target_procedure, "_run_all", lambda runs, machine, report: ledger.plan(runs, machine))
    finals = {target_procedure.VARIANT_SEED: float("nan"), target_procedure.VARIANT_SEED + 1: value}
    monkeypatch.setattr(target_procedure, "_final_value", lambda entry, facts: finals.get(entry.path.study, 1.4))
    if value == value:
        assert measure_variant_target("gpt2", "silu", *tiny).target == 1.5
    else:
        with pytest.raises(UserError, match="gpt2_silu: no finalist trains on most of the seeds 910300 to 910302"):
            measure_variant_target("gpt2", "silu", *tiny)


@pytest.mark.parametrize("provenance", ["null", "{winner: adamw lr 0.016}", "{finalists: {adamw 1: [1.4]}}"])
def test_without_finalists_a_variant_has_no_target(tiny: Procedure, provenance: str) -> None:
    path = target_file("gpt2", "mini")
    path.write_text(path.read_text().partition("target_provenance:")[0] + f"target_provenance: {provenance}\n")
    with pytest.raises(UserError, match=r"finalists.*`python scripts/set_targets.py gpt2 --scale mini --write` first"):
        measure_variant_target("gpt2", "silu", *tiny)


def test_a_variant_that_does_not_exist(tiny: Procedure) -> None:
    with pytest.raises(UserError, match="variant=map: workload=gpt2 has no such variant"):
        measure_variant_target("gpt2", "map", *tiny)


@pytest.mark.parametrize(
    ("before", "version"), [("null", 1), ("???", 1), ("1.5", 1), ("1.4", 2)], ids=["null", "missing", "same", "other"]
)
def test_a_first_target_keeps_version_1(tmp_path: Path, before: str, version: int) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        f"# What it is.\nvariant: silu\ntarget: {before}\ntarget_version: 1\nmodel: {{activation: silu}}\n"
        + ("target_provenance: {old: 1}\n" if before == "1.4" else "")
    )
    write_target(path, MeasuredTarget(1.5, True, None, {"winner": "adamw 3"}))
    assert path.read_text().startswith("# What it is.\nvariant: silu\n")
    assert yaml.safe_load(path.read_text()) == {
        "variant": "silu",
        "target": 1.5,
        "target_version": version,
        "model": {"activation": "silu"},
        "target_provenance": {"winner": "adamw 3"},
    }


def test_seeds_of_the_steps_are_apart_and_no_studys() -> None:
    t = target_procedure
    used = [t.GRID_SEED, *range(t.FINALIST_SEED, t.FINALIST_SEED + t.FINALIST_RUNS)]
    used += [*range(t.CONFIRM_SEED, t.CONFIRM_SEED + t.CONFIRM_RUNS)]
    used += [*range(t.VARIANT_SEED, t.VARIANT_SEED + t.FINALIST_RUNS)]
    assert len(set(used)) == len(used) and min(used) >= 900_120
    assert set(used) <= set(study_trials.TARGET_SEEDS)
