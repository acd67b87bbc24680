"""Measure the target of a workload, and whether the workload is quiet enough to be an instrument.

    python scripts/set_targets.py gpt2 resnet vit [--variant NAME] [--scale mini] [--workers 2] [--write]

The procedure is in harness/study/target_procedure.py. It is a resumable job of the ledger: trials that are finished in
--records are not run again, and scripts/status.py shows how far it is. Records that lie packed there are unpacked;
`python scripts/records.py pack results/targets` packs them again. With --write, an accepted target is written into
the config of the workload, or of the variant, with its provenance and a new version. A variant needs the finalists of
its workload, which is measured first. Exit status 1 if a target was rejected or a workload is not quiet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.command_line import run_script
from harness.config.choices import BASE_VARIANT, target_file
from harness.display import make_console
from harness.study.target_procedure import measure_target, measure_variant_target, write_target


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--variant", default=BASE_VARIANT, help="measure this held-out variant of the workloads")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--records", type=Path, default=Path("results/targets"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--machine", default="cpu-1-thread", help="folder of the records; steps do not depend on it")
    parser.add_argument("--write", action="store_true", help="write target and provenance into the config")
    options = parser.parse_args(arguments)
    console = make_console()
    arguments = [f"records={options.records}", f"executor.workers={options.workers}", f"machine={options.machine}"]
    all_accepted = True

    def report(line: str) -> None:
        console.print(line, markup=False)

    for workload in options.workloads:
        common = (options.scale, arguments, options.machine, report)
        if options.variant == BASE_VARIANT:
            name, measured = workload, measure_target(workload, *common)
        else:
            name = f"{workload}_{options.variant}"
            measured = measure_variant_target(workload, options.variant, *common)
        report(f"{name} target     {measured.target}: {measured.verdict}")
        # None: a held-out variant need not be quiet.
        all_accepted = all_accepted and measured.accepted and measured.quiet is not False
        if options.write and measured.accepted:
            path = target_file(workload, options.scale, options.variant)
            write_target(path, measured)
            report(f"written: {path}")
    return 0 if all_accepted else 1


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
