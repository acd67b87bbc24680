"""Every forged or unfair set of records that was ever taken for good, each with the honest one beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.review.audit import audit
from harness.review.finding import Finding, Severity
from harness.scoring.load_records import load_records
from tests.harness.review.forging import CLOCKS, Forge, Trial, add_evidence, honest, of, write


def findings_of(root: Path) -> list[Finding]:
    """What an audit finds, without its notes."""
    return [finding for finding in audit([root])[1] if finding.severity is not Severity.NOTE]


def manifest_of(trial: Trial) -> dict[str, Any]:
    assert trial.manifest is not None
    return trial.manifest


# ---- the forgeries -------------------------------------------------------------------------------------------------


def scale_clock(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(0.1, *CLOCKS)


def scale_clock_and_final(trials: list[Trial]) -> None:
    """With the manifests to match; the other columns tell."""
    for trial in of(trials, "adamw"):
        trial.scale_columns(0.1, *CLOCKS, "accumulated_data_wait_time")
        final = manifest_of(trial)["final"]
        if final["time_to_target"] is not None:
            final["time_to_target"] = final["time_to_target"] * 0.1


def say_exhausted(trials: list[Trial]) -> None:
    scale_clock(trials)
    for trial in of(trials, "adamw"):
        manifest_of(trial)["status"] = "exhausted"


def remove_manifests(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.manifest = None


def one_row(trials: list[Trial]) -> None:
    trial = of(trials, "adamw")[0]
    row = trial.rows[0] | {"global_step": "1", "score": "1e-9", "accumulated_submission_time": "1e-9"}
    trial.rows = [row | {"validation/loss": "0.0"}]


def move_target_of_all(trials: list[Trial]) -> None:
    of(trials, "adamw")[0].set_workload(target=3.0, target_version=99)


def easier_target(trials: list[Trial]) -> None:
    for trial in trials:
        trial.set_workload(target=3.0)


def ten_trials(trials: list[Trial]) -> None:
    for trial in of(honest(), "muon"):
        trial.number += 5
        trials.append(trial)


def one_trial_of_five(trials: list[Trial]) -> None:
    trials[:] = [trial for trial in trials if trial.label != "muon" or trial.number == 1]


def copy_one_trial(trials: list[Trial]) -> None:
    """Over all of its submission, with folder and seeds to match."""
    first, *others = of(trials, "adamw")
    for trial in others:
        trial.rows = first.rows
        manifest_of(trial)["final"] = manifest_of(first)["final"]
        manifest_of(trial)["status"] = manifest_of(first)["status"]


def copy_with_other_clocks(trials: list[Trial]) -> None:
    copy_one_trial(trials)
    for i, trial in enumerate(of(trials, "adamw")):
        trial.rows = [dict(row) for row in trial.rows]
        trial.scale_columns(1 + 1e-7 * i, *CLOCKS, "total_duration", "accumulated_eval_time")


def longer_budget(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.set_workload(max_steps=16_000)


def smaller_model(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.set_workload(model=manifest_of(trial)["identity"]["workload"]["model"] | {"width": 8})


def other_data(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw")[:3]:
        manifest_of(trial)["data"]["text"] = "0" * 64


def other_settings(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw")[:5]:
        trial.set_identity(precision="bf16", compile=True, threads=8)
        manifest_of(trial)["packages"]["torch"] = "2.9.0"


def wrong_hash(trials: list[Trial]) -> None:
    manifest_of(of(trials, "adamw")[0])["config_hash"] = "0" * 64


def other_seed(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.set_identity(seed=trial.study + 5)
        manifest_of(trial)["seeds"]["study"] = trial.study + 5


def rename_study(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.study = 777 if trial.study == 0 else trial.study


def beyond_the_budget(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        last = trial.rows[-1]
        last["global_step"] = str(int(last["global_step"]) + 400)
        manifest_of(trial)["final"]["global_step"] = int(last["global_step"])


def fewer_examples(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(0.1, "examples")


def more_cpu(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(4.0, "accumulated_cpu_time")


def another_class(trials: list[Trial]) -> None:
    """A third of the trials; the label is none of configs/."""
    for trial in of(trials, "adamw"):
        trial.label = manifest_of(trial)["submission"] = "mine"
        if trial.study == 2:
            for part in ("identity", "config"):
                manifest_of(trial)[part]["optimizer"]["class_path"] = "torch.optim.SGD"
            trial.rehash()


def label_of_another(trials: list[Trial]) -> None:
    """As label=adamw does for muon."""
    trials[:] = of(trials, "muon")
    for trial in trials:
        trial.label = manifest_of(trial)["submission"] = "adamw"


def rename_label(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.label = "worse"


def outside_the_search_space(trials: list[Trial]) -> None:
    trial = of(trials, "adamw")[0]
    manifest_of(trial)["identity"]["optimizer"]["hyperparameters"]["lr"] = 0.5
    manifest_of(trial)["hyperparameters"]["lr"] = 0.5
    trial.rehash()


def picked_seeds(trials: list[Trial]) -> None:
    trials[:] = [trial for trial in trials if trial.label != "muon" or trial.study != 1]


def batches_larger_than_they_claim(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(10, "forward_examples", "backward_examples")


def more_updates(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(2, "update_steps")


def other_base_seed(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        manifest_of(trial)["seeds"]["base"] += 1


def more_evaluations(trials: list[Trial]) -> None:
    """A grid of its own, finer than everybody's."""
    for trial in of(trials, "adamw"):
        for row in trial.rows[:-1]:
            row["global_step"] = str(int(row["global_step"]) - 10)


def other_configuration(trials: list[Trial]) -> None:
    """A timing run would build something else."""
    for trial in of(trials, "adamw"):
        manifest_of(trial)["config"]["optimizer"]["class_path"] = "torch.optim.SGD"


def clock_backwards(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.rows[5]["accumulated_eval_time"] = "0.0"


def time_from_nowhere(trials: list[Trial]) -> None:
    for trial in of(trials, "adamw"):
        trial.scale_columns(3, "total_duration")


FORGERIES: dict[str, tuple[Forge, Severity, str]] = {
    "the clock x 0.1": (scale_clock, Severity.REFUSED, "final.time_to_target="),
    "the clock x 0.1, manifests to match": (scale_clock_and_final, Severity.WARNING, "accumulated_cpu_time="),
    "the clock x 0.1, status exhausted": (say_exhausted, Severity.REFUSED, "status=exhausted, and the rows say"),
    "no manifests": (remove_manifests, Severity.REFUSED, "manifest.json: missing, so nothing can be checked"),
    "one row": (one_row, Severity.REFUSED, "evaluations are made every 20 steps"),
    "one trial moves the target of all": (
        move_target_of_all,
        Severity.REFUSED,
        "target_version=99, and configs/ has 2",
    ),
    "all say an easier target": (easier_target, Severity.REFUSED, "workload.target=3.0, and configs/ has 1.3951"),
    "ten trials against five": (ten_trials, Severity.REFUSED, "ruleset external gives 5: it does not count"),
    "one trial against five": (one_trial_of_five, Severity.WARNING, "trials are missing, which count as not reached"),
    "one trial copied": (copy_one_trial, Severity.REFUSED, "one of the two is a copy"),
    "one trial copied, other clocks": (copy_with_other_clocks, Severity.REFUSED, "its training losses equal those of"),
    "ten times the budget": (longer_budget, Severity.REFUSED, "max_steps=16000, and ruleset external gives 1600"),
    "another model": (smaller_model, Severity.REFUSED, "workload.model="),
    "other data": (other_data, Severity.REFUSED, "run these again on the same data"),
    "bf16, compilation, threads, torch": (other_settings, Severity.REFUSED, 'run these again with precision="fp32"'),
    "a wrong hash": (wrong_hash, Severity.REFUSED, "config_hash=00000000..."),
    "another seed than the folder's": (other_seed, Severity.REFUSED, "identity.seed=5, and its folder is study_0"),
    "a study renamed": (rename_study, Severity.REFUSED, "identity.seed=0, and its folder is study_777"),
    "steps beyond the budget": (beyond_the_budget, Severity.REFUSED, "beyond the budget of 1600 steps"),
    "fewer examples": (fewer_examples, Severity.REFUSED, "examples=5120: 1600 steps of 32 are 51200"),
    "more CPU than threads": (more_cpu, Severity.WARNING, "s in a second of the clock, and threads=1"),
    "another class under a label": (another_class, Severity.REFUSED, "class_path=torch.optim.SGD"),
    "the label of another": (label_of_another, Severity.REFUSED, "adamw is the name of torch.optim.AdamW"),
    "a folder renamed": (rename_label, Severity.REFUSED, "submission=adamw, and its folder is of worse"),
    "outside the search space": (outside_the_search_space, Severity.REFUSED, "lr=0.5: outside the search space"),
    "picked seeds": (picked_seeds, Severity.WARNING, "studies 0, 2: seeds must count up from 0"),
    "larger batches": (batches_larger_than_they_claim, Severity.REFUSED, "no declared need takes a batch twice"),
    "more updates": (more_updates, Severity.REFUSED, "update_steps=3200: more than the 1600 nominal steps"),
    "another base seed": (other_base_seed, Severity.REFUSED, "seeds.base="),
    "a finer grid": (more_evaluations, Severity.REFUSED, "global_step=10 in row 1"),
    "another configuration": (other_configuration, Severity.REFUSED, "config.optimizer.class_path=torch.optim.SGD"),
    "a column that shrinks": (clock_backwards, Severity.REFUSED, "evaluation: decrease from one row to a later one"),
    "time that no column has": (time_from_nowhere, Severity.WARNING, "no column accounts for"),
}


@pytest.fixture(scope="module")
def honest_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("honest"), honest())


def test_the_honest_records_are_not_flagged(honest_root: Path) -> None:
    assert not findings_of(honest_root)
    records = load_records([honest_root])
    assert set(records.trials["status"]) == {"reached", "exhausted"}
    assert all(problem.message.startswith("note: ") for problem in records.problems)


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_found_and_the_honest_submission_beside_it_is_not(name: str, tmp_path: Path) -> None:
    forge, severity, message = FORGERIES[name]
    trials = honest()
    forge(trials)
    root = write(tmp_path, trials)
    listed = findings_of(root)
    matching = [finding for finding in listed if finding.severity is severity and message in finding.message]
    assert matching, [(finding.severity, finding.message) for finding in listed[:5]]
    forged = {trial.label for trial in trials} - {trial.label for trial in honest()}
    blamed = {finding.path.split("/")[3] for finding in listed if finding.trial is not None}
    # The other submission, where only one was forged.
    if name not in ("all say an easier target", "ten trials against five", "one trial against five", "picked seeds"):
        assert "muon" not in blamed and (not forged or blamed <= forged | {"adamw"})
    records = load_records([root])
    if severity is Severity.REFUSED:
        refused = records.trials[records.trials["status"] == "invalid"]
        paths = {finding.path for finding in listed if finding.severity is severity}
        assert set(refused["path"]) == paths
        assert refused["seconds"].isna().all()
        messages = {problem.path: problem.message for problem in records.problems}
        assert all(messages[path].startswith("refused: ") for path in paths)
    else:
        assert any(message in problem.message for problem in records.problems)
    # Nobody's target moved.
    assert records.targets.targets["gpt2"].value == 1.3951


def test_code_that_differed_from_its_commit_is_a_note(tmp_path: Path) -> None:
    trials = honest()
    for trial in trials:
        manifest_of(trial)["code"]["modified"] = trial.label == "muon"
    (finding, *others) = [f for f in audit([write(tmp_path, trials)])[1] if "code.modified" in f.message]
    assert finding.severity is Severity.NOTE and "15 of muon" in finding.message and not others


# ---- what nobody can call a minority -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["precision", "torch", "deterministic", "threads", "device", "compile"])
def test_half_and_half_is_no_table_unless_it_is_accepted(key: str, tmp_path: Path) -> None:
    trials = honest()
    other = {"precision": "bf16", "threads": 2, "compile": True, "deterministic": False}
    for trial in of(trials, "muon"):
        if key in other:
            trial.set_identity(**{key: other[key]})
        elif key == "torch":
            manifest_of(trial)["packages"]["torch"] = "2.9.0"
        else:
            manifest_of(trial)["machine"]["device"] = "cuda"
    root = write(tmp_path, trials)
    with pytest.raises(UserError, match=rf"gpt2: the records mix values of {key} .*15 of adamw.*--mix {key}"):
        load_records([root])
    (finding,) = [finding for finding in findings_of(root) if finding.severity is Severity.REFUSED]
    assert finding.trial is None and key in finding.message
    records = load_records([root], accepted=[key])
    assert (records.trials["status"] != "invalid").all()
    assert any(f"taken as --mix {key} says" in problem.message for problem in records.problems)
    # Of one submission there is nothing to mix.
    assert load_records([root], submissions=["muon"]).trials["submission"].nunique() == 2


def test_a_workload_that_no_config_has_must_be_the_same_in_all(tmp_path: Path) -> None:
    trials = honest()
    for trial in trials:
        manifest_of(trial)["identity"]["scale"] = {"name": "own"}
        manifest_of(trial)["config"]["scale"] = {"name": "own"}
        trial.rehash()
    root = write(tmp_path / "same", trials)
    with pytest.raises(UserError, match=r"no config has this workload at scale=own.*--config-dir FOLDER.*--targets"):
        load_records([root])
    assert not findings_of(root)
    of(trials, "adamw")[0].set_workload(max_steps=16_000)
    (finding,) = findings_of(write(tmp_path / "other", trials))
    assert finding.severity is Severity.REFUSED and "pacemark --config-dir FOLDER names yours" in finding.message


# ---- evidence ------------------------------------------------------------------------------------------------------

Evidence = dict[str, Any]


def last_row(**values: Any) -> Forge:
    def forge(trials: list[Trial]) -> None:
        for trial in of(trials, "muon"):
            trial.rows[-1] |= {key: str(value) for key, value in values.items()}

    return forge


def evidence(**values: Any) -> Forge:
    def forge(trials: list[Trial]) -> None:
        for trial in of(trials, "muon"):
            manifest_of(trial)["evidence"] |= values

    return forge


def other_model(trials: list[Trial]) -> None:
    manifest_of(of(trials, "muon")[0])["evidence"]["model_sha256"] = "2" * 64


def other_start(trials: list[Trial]) -> None:
    manifest_of(of(trials, "muon")[0])["evidence"]["initial_weights_sha256"] = "2" * 64


MANY_LIVES = [{"first_row": 3, "seconds": 20.0}] * 9
OF_EVIDENCE: dict[str, tuple[Forge, Severity, str]] = {
    "uncounted passes": (last_row(counted_forward_examples=99_999), Severity.REFUSED, "counted_forward_examples=99999"),
    "passes off the clock": (last_row(off_clock_forward_examples=32), Severity.REFUSED, "passes through the model"),
    "training off the clock": (last_row(off_clock_changes=1), Severity.REFUSED, "weights changed while the clock"),
    "a patched clock": (last_row(accumulated_second_clock_time=500), Severity.REFUSED, "the judge's clock has 500 s"),
    "a slow clock": (last_row(accumulated_second_clock_time=70), Severity.WARNING, "the judge's clock has 70 s"),
    "a fast clock": (last_row(accumulated_second_clock_time=9), Severity.WARNING, "has only 9 s"),
    "children": (last_row(accumulated_children_cpu_time=8), Severity.WARNING, "processes of its own worked"),
    "work off the clock": (last_row(accumulated_off_clock_cpu_time=99), Severity.WARNING, "while the clock stood"),
    "more threads": (evidence(threads=8), Severity.REFUSED, "evidence.threads=8: more than threads=1"),
    "more CPU": (last_row(accumulated_second_cpu_time=300), Severity.WARNING, "more than threads=1 can take"),
    "tampered": (evidence(tampered=["eval_measurements.csv"]), Severity.REFUSED, "another process than the judge"),
    "files": (evidence(files_opened=["w.pt"]), Severity.WARNING, "evidence.files_opened=[w.pt]"),
    "network": (evidence(connections=["10.0.0.1"]), Severity.WARNING, "connected to while it trained"),
    "programs": (evidence(programs=["sh"]), Severity.WARNING, "started while it trained"),
    "a changed model": (evidence(model_changes=["h.0"]), Severity.WARNING, "its model was not the workload's"),
    "a changed model without judge": (
        evidence(model_changes=["h.0"], judge="replay"), Severity.REFUSED, "when it was evaluated",
    ),
    "no judge": (evidence(judge="none"), Severity.WARNING, "ruleset external has judge=process"),
    "pretrained": (evidence(built_weights_sha256="2" * 64), Severity.WARNING, "building the submission changed"),
    "another model": (other_model, Severity.REFUSED, "evidence.model_sha256=222222222222"),
    "other initial weights": (other_start, Severity.WARNING, "evidence.initial_weights_sha256=222222222222"),
    "training at import": (evidence(import_cpu_seconds=120.0), Severity.WARNING, "importing it took long"),
    "many lives": (evidence(lives=MANY_LIVES), Severity.WARNING, "9 processes began at the same row"),
    "long lives": (evidence(lives=[{"first_row": 0, "seconds": 900.0}]), Severity.WARNING, "ask what was lost"),
}  # fmt: skip


def test_honest_evidence_is_not_flagged(tmp_path: Path) -> None:
    trials = honest()
    add_evidence(trials)
    _, findings = audit([write(tmp_path, trials)])
    assert not [finding for finding in findings if "code.modified" not in finding.message]


@pytest.mark.parametrize("name", OF_EVIDENCE)
def test_evidence_against_a_submission_is_found(name: str, tmp_path: Path) -> None:
    forge, severity, message = OF_EVIDENCE[name]
    trials = honest()
    add_evidence(trials)
    forge(trials)
    listed = findings_of(write(tmp_path, trials))
    matching = [finding for finding in listed if finding.severity is severity and message in finding.message]
    assert matching, [(finding.severity, finding.message) for finding in listed[:5]]
    # Of two different starts nobody can say which is right.
    blamed = {finding.path.split("/")[3] for finding in listed}
    assert blamed == ({"adamw", "muon"} if name == "other initial weights" else {"muon"})
