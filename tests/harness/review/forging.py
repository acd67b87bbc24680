"""Honest records, the committed ones of two tuned submissions on gpt2, and the means to forge them."""

from __future__ import annotations

import copy
import csv
import functools
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.hashing import config_hash
from harness.records.archive import read_archive

COMMITTED = Path(__file__).parents[3] / "results" / "external" / "records" / "mini" / "external" / "cpu-1-thread"
LABELS = ("adamw", "muon")
Rows = list[dict[str, str]]


@dataclass
class Trial:
    """A trial that a test may change before it is written."""

    label: str
    study: int
    number: int
    manifest: dict[str, Any] | None
    rows: Rows

    def rehash(self) -> None:
        """Make the hash right again, as a forger would."""
        assert self.manifest is not None
        self.manifest["config_hash"] = config_hash(self.manifest["identity"])

    def set_workload(self, **values: Any) -> None:
        """Change keys of the workload wherever the manifest has them."""
        assert self.manifest is not None
        for part in ("identity", "config"):
            self.manifest[part]["workload"] |= values
        repeated = {"version": "workload_version", "target": "target", "target_version": "target_version"}
        for key in repeated.keys() & values.keys():
            self.manifest[repeated[key]] = values[key]
        self.rehash()

    def set_identity(self, **values: Any) -> None:
        """Change keys of the identity and of the configuration."""
        assert self.manifest is not None
        self.manifest["identity"] |= values
        self.manifest["config"] |= values
        self.rehash()

    def scale_columns(self, factor: float, *names: str) -> None:
        """Multiply columns of the rows."""
        for row in self.rows:
            for name in names:
                row[name] = repr(float(row[name]) * factor)


@functools.cache
def _committed() -> tuple[Trial, ...]:
    trials = []
    for label in LABELS:
        for folder, packed in read_archive(COMMITTED / f"{label}.tar.xz").trials.items():
            if "gpt2_pytorch" not in folder:
                continue
            rows = list(csv.DictReader(io.StringIO(packed.files["eval_measurements.csv"].decode())))
            manifest = json.loads(packed.files["manifest.json"])
            trials.append(Trial(label, packed.study, packed.trial, manifest, rows))
    return tuple(sorted(trials, key=lambda trial: (trial.label, trial.study, trial.number)))


def honest() -> list[Trial]:
    """Thirty trials: two submissions, three studies of five, to be changed."""
    return copy.deepcopy(list(_committed()))


def of(trials: Iterable[Trial], label: str) -> list[Trial]:
    """Those of one submission."""
    return [trial for trial in trials if trial.label == label]


def write(root: Path, trials: Iterable[Trial]) -> Path:
    """Write the trials as folders of records; `root`."""
    for trial in trials:
        folder = root / "mini/external/machine" / trial.label / f"study_{trial.study}"
        folder = folder / "gpt2_pytorch" / f"trial_{trial.number}"
        folder.mkdir(parents=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(trial.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(trial.rows)
        (folder / "eval_measurements.csv").write_text(text.getvalue())
        if trial.manifest is not None:
            (folder / "manifest.json").write_text(json.dumps(trial.manifest))
    return root


Forge = Callable[[list[Trial]], Any]


CLOCKS = ("accumulated_submission_time", "score")
EVIDENCE = {
    "accumulated_second_clock_time": lambda row: float(row["score"]) * 1.01,
    "accumulated_second_cpu_time": lambda row: float(row["accumulated_cpu_time"]) * 1.01,
    "counted_forward_examples": lambda row: row["forward_examples"],
    "off_clock_forward_examples": lambda _: 0,
    "accumulated_children_cpu_time": lambda _: 0.0,
    "accumulated_off_clock_cpu_time": lambda _: 0.5,
    "off_clock_changes": lambda _: 0,
}


def add_evidence(trials: list[Trial]) -> None:
    """The evidence that a judge would have seen of the honest trials."""
    for trial in trials:
        assert trial.manifest is not None
        initial = f"{trial.study}{trial.number}" * 32
        trial.manifest["evidence"] = {
            "judge": "process",
            "sources": {"submissions.muon": "0" * 64},
            "initial_weights_sha256": initial,
            "built_weights_sha256": initial,
            "model_sha256": "1" * 64,
            "lives": [{"first_row": 0, "seconds": float(trial.rows[-1]["total_duration"]) + 3}],
            "import_cpu_seconds": 0.4,
            "threads": 1,
        }
        for row in trial.rows:
            row |= {name: str(make(row)) for name, make in EVIDENCE.items()}  # type: ignore[no-untyped-call]
