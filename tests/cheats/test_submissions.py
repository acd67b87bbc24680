"""What becomes of each cheat: it gains nothing, its trial ends, or its record says what it did."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.config.compose import load_run
from harness.records.evaluations import REVIEW_COLUMNS, parse_evaluations
from harness.records.layout import EVALUATIONS
from harness.records.manifest import Manifest
from harness.review.columns import TrialRows, check_columns
from harness.review.evidence import check_evidence
from harness.review.shipped import Shipped
from tests import forked
from tests.cheats.cheats import FOLDER_VARIABLE, Honest
from tests.conftest import TINY_GPT2

HERE = "tests.cheats.cheats"


@dataclass
class Judged:
    """The record of a judged trial."""

    manifest: dict[str, Any]
    rows: list[dict[str, str]]
    folder: Path

    @property
    def losses(self) -> list[str]:
        """Of the evaluations."""
        return [row["validation/loss"] for row in self.rows]

    @property
    def evidence(self) -> dict[str, Any]:
        """Of the manifest."""
        evidence: dict[str, Any] = self.manifest["evidence"]
        return evidence

    def last(self, column: str) -> float:
        """The last value of a column; 0 where there is no row."""
        return float(self.rows[-1][column]) if self.rows else 0.0


def run_judged(folder: Path, class_path: str, lives: int = 1) -> Judged:
    run = load_run([
        *TINY_GPT2, "optimizer=any", f"optimizer.class_path={HERE}.Honest", f"records={folder}", "judge=process",
        "checkpoint_seconds=0", "machine=here",
    ])  # fmt: skip
    # Not on the command line: checking it would import the cheat into this process, which some cheats change.
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"class_path": class_path})})
    environment = os.environ | {FOLDER_VARIABLE: str(folder)}
    for _ in range(lives):
        process = forked.run("tests.judged_trial", "retry", env=environment, input=run.model_dump_json())
        assert process.returncode == 0, process.stderr
    record = next(folder.rglob("trial_1"))
    rows: list[dict[str, str]] = []
    if (record / "eval_measurements.csv").exists():
        with (record / "eval_measurements.csv").open() as file:
            rows = list(csv.DictReader(file))
    return Judged(json.loads((record / "manifest.json").read_text()), rows, record)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return run_judged(tmp_path_factory.mktemp("honest"), f"{HERE}.Honest")


def signs(judged: Judged) -> set[str]:
    """What a review says of the record against its submission: the severity and the first word of each finding."""
    manifest = Manifest.model_validate(judged.manifest)
    rows = None
    if judged.rows:
        content = (judged.folder / EVALUATIONS).read_bytes()
        parsed = parse_evaluations({0: content}, {0: manifest.metric}, REVIEW_COLUMNS)
        rows = TrialRows.of(parsed.rows, 0)
    remarks = [*check_evidence(manifest, rows, Shipped())]
    remarks += [] if rows is None else check_columns(manifest, rows)
    return {f"{remark.severity} {re.split('[=:]', remark.message)[0]}" for remark in remarks}


def test_the_honest_run_shows_no_sign(honest: Judged) -> None:
    assert signs(honest) == set()
    assert honest.manifest["status"] == "exhausted" and not honest.evidence["judge_imported"]


FILES, PROGRAMS, MODEL = "warning evidence.files_opened", "warning evidence.programs", "warning evidence.model_changes"
PATCHED, CLOCK = "refused evidence.patched", "refused accumulated_submission_time"
COUNTED, OFF_CLOCK = "refused counted_forward_examples", "refused off_clock_forward_examples"
CHANGED = "refused off_clock_changes"
NO_GAIN = {
    "EditsTarget": set[str](),
    "EditsBudget": set[str](),
    "PatchesEvaluation": {PATCHED},
    "AnswersInForward": {MODEL},
    "EvaluationHook": {MODEL},
    "OtherLayer": {MODEL},
    "PatchesClock": {PATCHED},
    "EditsElapsed": {CLOCK},
    "LargerBatches": set[str](),
    "WritesRecord": {FILES, "refused evidence.tampered"},
    "WritesRecordAtExit": set[str](),
    "WritesRecordLater": {PROGRAMS},
    "WritesElsewhere": {FILES},
    "EditsHarness": {FILES},
    "ReadsJudgeMemory": {FILES},
    "ReadsHeldBackData": {FILES},
    "FetchesWeights": {"warning evidence.connections"},
    "TrainsInChild": {PROGRAMS},
    "MoreThreads": {"refused evidence.threads"},
}
"""Cheats under which the judge measures what it measures of the honest run, and what the record says of them."""


@pytest.mark.parametrize("name", NO_GAIN)
def test_it_gains_nothing(honest: Judged, tmp_path: Path, name: str) -> None:
    judged = run_judged(tmp_path, f"{HERE}.{name}")
    assert judged.losses == honest.losses
    assert (judged.manifest["status"], judged.manifest["target"]) == ("exhausted", honest.manifest["target"])
    # An edited clock shows in further columns, which depend on the time that it had.
    assert signs(judged) >= NO_GAIN[name] if CLOCK in NO_GAIN[name] else signs(judged) == NO_GAIN[name]


FLAGGED = {
    "EditsGrid": {"refused forward_examples", "refused backward_examples", "refused update_steps"},
    "SeesTheFuture": {"warning evidence.patched"},
    "TrainsInStateTensors": {COUNTED, OFF_CLOCK, CHANGED},
    "TrainsInStateDict": {COUNTED, OFF_CLOCK, CHANGED},
    "CopiesInStateDict": {COUNTED, OFF_CLOCK},
    "TrainsInDel": {COUNTED, OFF_CLOCK, CHANGED},
    "TrainsInEvaluationWeights": {COUNTED},
    "UncountedPasses": {COUNTED},
    "RewindsPasses": {COUNTED},
    "LoadsWeights": {FILES, "warning evidence.built_weights_sha256"},
}
"""Cheats that train better than the honest run, and what their records say."""


@pytest.mark.parametrize("name", FLAGGED)
def test_its_record_says_so(honest: Judged, tmp_path: Path, name: str) -> None:
    judged = run_judged(tmp_path, f"{HERE}.{name}")
    assert judged.losses != honest.losses
    assert signs(judged) == FLAGGED[name]


def test_training_in_a_thread_is_seen_or_fails(tmp_path: Path) -> None:
    judged = run_judged(tmp_path, f"{HERE}.TrainsInThread")
    # It races with the step, whose backward may find its weights changed.
    assert judged.manifest["status"] == "failed" or COUNTED in signs(judged)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("EmptySelection", "with n > 0"),
        ("UsesHeldBackData", "KeyError: 'validation'"),
        ("OtherArchitecture", "do not fit the model of workload=gpt2: helper.bias"),
    ],
)
def test_its_trial_fails(tmp_path: Path, name: str, words: str) -> None:
    judged = run_judged(tmp_path, f"{HERE}.{name}")
    assert judged.manifest["status"] == "failed" and not judged.rows
    assert words in judged.manifest["final"]["traceback"]


def test_weights_that_are_carried_over_a_death(tmp_path: Path) -> None:
    judged = run_judged(tmp_path, f"{HERE}.CarriesOver", lives=2)
    assert signs(judged) == {FILES}
    assert [life["first_row"] for life in judged.evidence["lives"]] == [0, 2]
    assert "with status 1" in judged.manifest["failures"][0]


def test_another_model_from_the_import(honest: Judged, tmp_path: Path) -> None:
    judged = run_judged(tmp_path, "tests.cheats.patches_at_import.PatchesAtImport")
    assert signs(judged) >= {MODEL, PATCHED}
    # The judge builds its model by its own code.
    assert judged.evidence["initial_weights_sha256"] == honest.evidence["initial_weights_sha256"]
    assert "the initial weights are not those of the seed" in judged.evidence["model_changes"]


def test_work_at_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = run_judged(tmp_path, "tests.cheats.trains_at_import.TrainsAtImport")
    assert judged.evidence["import_cpu_seconds"] > 1.4
    # Libraries take seconds, so what is worth a warning would be long in a test.
    monkeypatch.setattr("harness.review.evidence._IMPORT_SECONDS", 1.0)
    assert signs(judged) == {"warning evidence.import_cpu_seconds"}


def test_what_was_left_behind_ends_before_the_record_is_written(tmp_path: Path) -> None:
    judged = run_judged(tmp_path, f"{HERE}.WritesRecordLater")
    for process in psutil.process_iter(["environ"]):
        environment: dict[str, str] = process.info["environ"] or {}
        assert environment.get(FOLDER_VARIABLE) != str(tmp_path), process
    assert judged.manifest["status"] == "exhausted"


def test_every_cheat_is_tried() -> None:
    import tests.cheats.cheats as module

    is_cheat: Callable[[Any], bool] = lambda value: isinstance(value, type) and issubclass(value, Honest)  # noqa: E731
    names = {name for name, value in vars(module).items() if is_cheat(value)} - {"Honest"}
    elsewhere = {"TrainsInThread", "EmptySelection", "UsesHeldBackData", "OtherArchitecture", "CarriesOver"}
    assert names == NO_GAIN.keys() | FLAGGED.keys() | elsewhere
