"""How long an audit of many records takes.

python benchmarks/audit.py [--trials 10000]
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import json
import tempfile
from pathlib import Path
from time import perf_counter

from harness.hashing import config_hash, trial_seed
from harness.records.archive import ArchivedTrial, read_archive
from harness.records.layout import EVALUATIONS, MANIFEST
from harness.review.audit import audit
from harness.review.finding import Severity

COMMITTED = Path(__file__).parents[1] / "results" / "external" / "records" / "mini" / "external" / "cpu-1-thread"


def write_trial(root: Path, label: str, trial: ArchivedTrial, study: int) -> None:
    """Write a committed trial as one of another study: honest in all that an audit looks at."""
    manifest = copy.deepcopy(json.loads(trial.files[MANIFEST]))
    for part in ("identity", "config"):
        manifest[part]["seed"] = study
    manifest["config_hash"] = config_hash(manifest["identity"])
    manifest["seeds"] = {"study": study, "trial": trial.trial, "base": trial_seed(study, trial.trial)}
    weights = hashlib.sha256(f"{label} {study} {trial.workload} {trial.trial}".encode()).hexdigest()
    manifest["final"]["weights_sha256"] = weights
    rows = list(csv.DictReader(io.StringIO(trial.files[EVALUATIONS].decode())))
    for row in rows:
        row["total_duration"] = repr(float(row["total_duration"]) + 1e-6 * study)
        row["train/loss"] = repr(float(row["train/loss"]) * (1 + 1e-9 * study))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder = root / label / f"study_{study}" / f"{trial.workload}_pytorch" / f"trial_{trial.trial}"
    folder.mkdir(parents=True)
    (folder / EVALUATIONS).write_text(text.getvalue())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def main() -> None:
    """Parse the command line, make the records and audit them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    archives = {path.name.partition(".")[0]: read_archive(path).trials for path in sorted(COMMITTED.glob("*.tar.xz"))}
    of_three_studies = sum(map(len, archives.values()))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for copy_number in range(-(-options.trials // of_three_studies)):
            for label, trials in archives.items():
                for trial in trials.values():
                    write_trial(root, label, trial, 3 * copy_number + trial.study)
        start = perf_counter()
        count, findings = audit([root])
        seconds = perf_counter() - start
    alarms = sum(finding.severity is not Severity.NOTE for finding in findings)
    print(f"{count:,} trials: {seconds:.1f} s, {1e3 * seconds / count:.2f} ms each; {alarms} refused or warned of")


if __name__ == "__main__":
    main()
