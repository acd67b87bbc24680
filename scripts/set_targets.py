"""Measure the target of a workload, and whether the workload is quiet enough to be an instrument.

    python scripts/set_targets.py gpt2 resnet vit [--variant NAME] [--scale mini] [--workers 2] [--write]

The procedure is that of harness/target_setting.py. It is a resumable job of the ledger: trials that are finished in
--records are not run again, and scripts/status.py shows how far it is. With --write, a target that was accepted goes
into the config of the workload, or of the variant, with its provenance and a new version. A variant comes after its
workload, whose finalists it takes. Exit status 1 if a target was rejected or a workload is not quiet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from harness import target_setting
from harness.choices import BASE, target_file
from harness.problems import reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--variant", default=BASE, help="measure this held-out variant of the workloads")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--records", type=Path, default=Path("results/targets"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--machine", default="cpu-1-thread", help="folder of the records; steps do not depend on it")
    parser.add_argument("--write", action="store_true", help="put target and provenance into the config")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    arguments = [f"records={options.records}", f"executor.workers={options.workers}", f"machine={options.machine}"]
    good = True

    def say(line: str) -> None:
        console.print(line, markup=False)

    for workload in options.workloads:
        where = (options.scale, arguments, options.machine, say)
        if options.variant == BASE:
            name, measured = workload, target_setting.measure(workload, *where)
        else:
            name = f"{workload}_{options.variant}"
            measured = target_setting.measure_variant(workload, options.variant, *where)
        say(f"{name} target     {measured.target}: {measured.verdict}")
        good = good and measured.accepted and measured.quiet is not False
        if options.write and measured.accepted:
            path = target_file(workload, options.scale, options.variant)
            target_setting.write(path, measured)
            say(f"written: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(reporting(main))
