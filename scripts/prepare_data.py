"""Get the data that no Python package brings, once: `python scripts/prepare_data.py DATASET`.

fashion_mnist: whatever the machine offers: data that are there already, Debian's package (as root, on Debian and
Ubuntu), the Hugging Face hub.

cifar10, imagenet, openwebtext (scale=full): from the hub or from a local copy into --root, where runs look for them.
If it is interrupted, the same command goes on where it stopped. docs/full_scale.md says what each needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.errors import PreparationError, WorkloadError
from workloads.data import cifar10, imagenet, openwebtext, prepared
from workloads.data.prepared import Prepared, Report

DATASETS = {"cifar10": cifar10.prepare, "imagenet": imagenet.prepare, "openwebtext": openwebtext.prepare}


def main() -> int:
    """Run the script and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["fashion_mnist", *DATASETS])
    parser.add_argument("--source", default="hub", help="hub (the default), or a folder with a local copy")
    parser.add_argument("--root", type=Path, help=f"where to (default: ${prepared.ROOT_VARIABLE}, or the user's cache)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--partial", action="store_true", help="take a part of the data set; no board counts its runs")
    parser.add_argument("--check", action="store_true", help="only hash what has been prepared again")
    parser.add_argument("--vocabulary", type=Path, help="openwebtext: folder with encoder.json and vocab.bpe")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: give a number from 1 on")
    try:
        if options.dataset == "fashion_mnist":
            return _fashion_mnist()
        return _prepare(options)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> int:
    root = (options.root or prepared.default_root()).expanduser()
    folder = root / options.dataset
    before = _read_prepared(folder, options.dataset)
    if before is not None:
        if not options.check and (damage := prepared.damage(before)):
            print(f"{damage}; preparing it again", file=sys.stderr)
        elif options.check and (damage := prepared.damage(before, thorough=True)):
            raise PreparationError(f"--check: {damage}; the same command without --check prepares it again")
        elif options.check:
            return _report(prepared.checked(before), "prepared before, every hash is right")
        elif before.complete or options.partial:
            return _report(before, "prepared before")
    if options.check:
        raise PreparationError(
            f"--check: {folder} holds no prepared {options.dataset}; leave --check out to prepare it"
        )
    prepare = DATASETS[options.dataset]
    if options.dataset == "openwebtext":
        prepare = partial(openwebtext.prepare, vocabulary=options.vocabulary)
    workers = options.workers or len(os.sched_getaffinity(0))
    with _progress(options.dataset) as report:
        result = prepare(options.source, root, partial=options.partial, workers=workers, report=report)
    return _report(result, "prepared")


@contextmanager
def _progress(name: str) -> Iterator[Report]:
    """A bar on a terminal; in a log file, a line every minute."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = float("-inf")

    def line(done: int, total: int) -> None:
        nonlocal last
        if done == total or monotonic() - last >= 60:
            last = monotonic()
            print(f"{name}: {done} of {total} pieces done", file=sys.stderr, flush=True)

    yield line


def _read_prepared(folder: Path, dataset: str) -> Prepared | None:
    try:
        return prepared.read(folder, dataset)
    except PreparationError:
        return None


def _report(data: Prepared, outcome: str) -> int:
    counts = ", ".join(f"{count:,} {name}" for name, count in data.counts.items())
    print(f"{data.dataset}, {outcome} in {data.folder}: {counts}; content {data.content}")
    if not data.complete:
        print(f"not the whole published data set ({data.missing_data}): runs on it are marked as modified")
    if os.environ.get(prepared.ROOT_VARIABLE) is None and data.folder.parent != prepared.default_root():
        print(f"add data={data.folder.parent} to run.py's arguments, or set {prepared.ROOT_VARIABLE}")
    return 0


def _fashion_mnist() -> int:
    # Brings torch, which the others need not wait for.
    from workloads.data import fashion_mnist

    if not fashion_mnist.DEBIAN.is_dir() and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "dataset-fashion-mnist"]):
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                print(f"{' '.join(command)} failed; trying the hub", file=sys.stderr)
                break
    try:
        source, splits = fashion_mnist.load("auto")
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(split.labels)} {name}" for name, split in splits.items())
    print(f"Fashion-MNIST from {source}: {counts} images, content hash right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
