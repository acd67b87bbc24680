"""Measure the target of a workload, and whether the workload is quiet enough to be an instrument.

    python scripts/set_targets.py gpt2 resnet vit [--scale mini] [--workers 2] [--write]

The procedure is that of harness/target_setting.py. It is a resumable job of the ledger: trials that are finished in
--records are not run again, and scripts/status.py shows how far it is. With --write, a target that was accepted goes
into the workload's config with its provenance and a new version. Exit status 1 if a target was rejected or a workload
is not quiet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from harness import target_setting
from harness.config import CONFIG_DIR
from harness.problems import reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--records", type=Path, default=Path("results/targets"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--machine", default="cpu-1-thread", help="folder of the records; steps do not depend on it")
    parser.add_argument("--write", action="store_true", help="put target and provenance into the config")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    arguments = [f"records={options.records}", f"executor.workers={options.workers}", f"machine={options.machine}"]
    good = True
    for workload in options.workloads:
        measured = target_setting.measure(
            workload, options.scale, arguments, options.machine, lambda line: console.print(line, markup=False)
        )
        verdict = "accepted" if measured.accepted else "REJECTED: the baseline misses it too often"
        if measured.accepted and not measured.quiet:
            verdict = "accepted, but the workload is NOT quiet enough to be an instrument"
        console.print(f"{workload} target     {measured.target}: {verdict}", markup=False)
        good = good and measured.accepted and measured.quiet
        if options.write and measured.accepted:
            path = CONFIG_DIR / "workload" / "scale" / f"{workload}-{options.scale}.yaml"
            target_setting.write(path, measured)
            console.print(f"written: {path}", markup=False)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(reporting(main))
