"""What in records contradicts itself, the configs of this repository or the other records.

    python scripts/audit.py RECORDS... [--mix precision...] [--json FILE] [--weights [--device cpu] [--data FOLDER]]

RECORDS are folders of records or archives. Prints a line for each finding, `severity kind path: message`, and a
summary. `refused`: no board takes it. `warning`: a board takes it, and a person has to look (docs/fair_play.md).
`note`: nothing is wrong. Exit status 0 if nothing is refused and there is no warning, 1 otherwise, 2 for a wrong
command line. --json also writes the findings as a list of objects with these four keys. Nothing that a record names is
imported. --weights evaluates the weights that trials with judge=replay have kept, on the real data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from harness.command_line import printable, run_script
from harness.files import write_atomically
from harness.review.audit import audit
from harness.review.finding import Severity
from harness.review.settings import MIXABLE


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--mix", choices=MIXABLE, nargs="+", default=[],
                        help="records may differ in these all the same")  # fmt: skip
    parser.add_argument("--weights", action="store_true", help="evaluate kept weights again")
    parser.add_argument("--device", default="auto", help="for --weights: auto, cpu, cuda, cuda:N")
    parser.add_argument("--data", default="auto", help="for --weights: auto, a source the workload knows, or a folder")
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    options = parser.parse_args(arguments)
    trials, findings = audit(options.records, accepted=options.mix)
    if options.weights:
        # Loads torch, which the rest does without.
        from harness.study.reevaluation import review_weights

        findings += review_weights(options.records, options.device, options.data)
    for finding in findings:
        print(printable(f"{finding.severity} {finding.kind} {finding.path}: {finding.message}"))
    counts = Counter(finding.severity for finding in findings)
    print(f"{trials:,} trials: " + ", ".join(f"{counts[severity]:,} {severity}" for severity in Severity))
    if options.json:
        keys = ("severity", "kind", "path", "message")
        content = [{key: str(getattr(finding, key)) for key in keys} for finding in findings]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, json.dumps(content, indent=1) + "\n")
    return 1 if counts[Severity.REFUSED] or counts[Severity.WARNING] else 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
