"""docs/records.md names every column, key and status that a trial writes, and none that it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.interface.model_runner import Counters
from harness.records.archive import read_archive
from harness.records.evaluations import EVIDENCE_COLUMNS
from harness.records.layout import ARCHIVE_SUFFIX, EVALUATIONS, MANIFEST
from harness.records.manifest import FORMAT_VERSION, Evidence, FinalFigures, Manifest
from harness.records.status import Status
from harness.trial import figures
from harness.trial.clock import Elapsed
from harness.trial.witness import EvidenceCounters

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "records.md").read_text()
METRICS = ("loss", "accuracy")


def listed(heading: str) -> set[str]:
    """The names in the first column of the table below a heading."""
    section = re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def generic(name: str) -> str:
    """A column or key with `<metric>` for the metric in its name."""
    return re.sub(rf"((validation|test)/)({'|'.join(METRICS)})(?=$|_at_target)", r"\1<metric>", name)


def columns_of_the_code() -> set[str]:
    """The columns that a trial writes, with energy and in every split."""
    training: Any = SimpleNamespace(
        clock=SimpleNamespace(tick=lambda: None, elapsed=Elapsed(energy=0.0)),
        nominal_step=1,
        runner=SimpleNamespace(counters=Counters()),
        witness=SimpleNamespace(
            counters=EvidenceCounters(**dict.fromkeys(EVIDENCE_COLUMNS.values(), 0))  # type: ignore[arg-type]
        ),
    )
    metrics = {"loss": 1.0, "accuracy": 0.5, "num_examples": 1.0}
    memory = dict.fromkeys(("peak_memory_bytes", "evaluation_memory_bytes", "data_memory_bytes"), 1)
    row = figures.row_values(training, 1.0, metrics, preemption_count=0, memory=memory, state_bytes=1)
    return {generic(column) for column in row | figures.split_columns("test", metrics)}


def committed(name: str) -> list[str]:
    """One file of this name of each submission in results/, for the test's speed."""
    archives = sorted((ROOT / "results").rglob(f"*{ARCHIVE_SUFFIX}"))
    assert archives, "results/ has no packed records"
    trials = [next(iter(read_archive(path).trials.values())) for path in archives]
    return [trial.files[name].decode() for trial in trials]


def test_every_column_is_listed() -> None:
    columns = columns_of_the_code()
    for text in committed(EVALUATIONS):
        columns |= {generic(column) for column in text.partition("\n")[0].split(",")}
    assert listed("Columns of eval_measurements.csv") == columns


def test_every_key_of_a_manifest_is_listed() -> None:
    keys = listed("Keys of manifest.json")
    assert keys == set(Manifest.model_fields)
    assert f"| `format_version` | {FORMAT_VERSION} " in TEXT
    parts = listed("In `arranged`, `seeds`, `data`, `code`, `machine`")
    assert listed("In `evidence`") == set(Evidence.model_fields)
    final = listed("In `final`")
    assert final >= set(FinalFigures.model_fields)
    for text in committed(MANIFEST):
        manifest = json.loads(text)
        assert keys >= set(manifest)
        assert final >= {generic(key) for key in manifest["final"]}
        for key in ("arranged", "seeds", "code", "machine"):
            assert parts >= {f"{key}.{part}" for part in manifest[key]}


def test_every_part_of_the_machine_is_listed() -> None:
    sources = [(ROOT / "harness" / "trial" / name).read_text() for name in ("hardware.py", "energy.py")]
    description = sources[0].partition("def describe_machine")[2].partition("\ndef ")[0]
    gpu = sources[1].partition("def describe_gpu")[2].partition("\ndef ")[0]
    written = set(re.findall(r'^ +"(\w+)": ', description + gpu, re.MULTILINE))
    assert {"cpu", "gpu", "gpu_driver"} < written
    assert {f"machine.{key}" for key in written} == {
        key for key in listed("In `arranged`, `seeds`, `data`, `code`, `machine`") if key.startswith("machine.")
    }


def test_every_status_is_listed() -> None:
    assert listed("Statuses") == set(Status)


@pytest.mark.parametrize("word", ["Disturbed", "Modified"])
def test_flags_are_explained(word: str) -> None:
    assert f"**{word}** " in TEXT
