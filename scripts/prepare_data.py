"""Prepare the data sets that no Python package contains, once: `python scripts/prepare_data.py DATASET`.

fashion_mnist: from the first of these that is available: data that are installed already, Debian's package (as root, on
Debian and Ubuntu), the Hugging Face hub.

cifar10, imagenet, openwebtext (scale=full): from the hub or from a local copy into --root, from which runs read them.
An interrupted preparation resumes when the same command is run again. docs/full_scale.md says what each needs.
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

from harness.command_line import run_script
from harness.errors import PreparationError, WorkloadError
from workloads.data import cifar10, imagenet, openwebtext, prepared
from workloads.data.prepared import PreparedData, ReportProgress

DATASETS = {"cifar10": cifar10.prepare, "imagenet": imagenet.prepare, "openwebtext": openwebtext.prepare}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["fashion_mnist", *DATASETS])
    parser.add_argument("--source", default="hub", help="hub (the default), or a folder with a local copy")
    parser.add_argument(
        "--root", type=Path, help=f"target folder (default: ${prepared.ROOT_VARIABLE}, or the user's cache)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--partial", action="store_true", help="accept an incomplete data set, for runs that no board counts"
    )
    parser.add_argument("--check", action="store_true", help="only check the hashes of the prepared files")
    parser.add_argument("--vocabulary", type=Path, help="openwebtext: folder with encoder.json and vocab.bpe")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: give a number from 1 on")
    try:
        if options.dataset == "fashion_mnist":
            return _prepare_fashion_mnist()
        return _prepare(options)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {prepared.RESUME}", file=sys.stderr)
        return 130


def _prepare(options: argparse.Namespace) -> int:
    """Prepare a data set of scale=full, or check it; returns the exit status. Raises PreparationError."""
    root = (options.root or prepared.default_root()).expanduser()
    folder = root / options.dataset
    existing = _read_prepared(folder, options.dataset)
    if existing is not None:
        # Without --check a quick look at the files; with it, every hash.
        if not options.check and (damage := prepared.find_damage(existing)):
            print(f"{damage}; preparing it again", file=sys.stderr)
        elif options.check and (damage := prepared.find_damage(existing, thorough=True)):
            raise PreparationError(f"--check: {damage}; the same command without --check prepares it again")
        elif options.check:
            return _print_summary(prepared.mark_as_checked(existing), "prepared before, all hashes match,")
        elif existing.complete or options.partial:
            return _print_summary(existing, "prepared before")
    if options.check:
        raise PreparationError(
            f"--check: {folder} holds no prepared {options.dataset}; leave --check out to prepare it"
        )
    prepare = DATASETS[options.dataset]
    if options.dataset == "openwebtext":
        prepare = partial(openwebtext.prepare, vocabulary=options.vocabulary)
    # The cores that this process may use: a scheduler can give it fewer than the machine has.
    workers = options.workers or len(os.sched_getaffinity(0))
    with _show_progress(options.dataset) as report:
        data = prepare(options.source, root, partial=options.partial, workers=workers, report=report)
    return _print_summary(data, "prepared")


@contextmanager
def _show_progress(name: str) -> Iterator[ReportProgress]:
    """A progress bar on a terminal; a line every minute in a log file."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last_print = float("-inf")

    def print_line(done: int, total: int) -> None:
        nonlocal last_print
        if done == total or monotonic() - last_print >= 60:
            last_print = monotonic()
            print(f"{name}: {done} of {total} units done", file=sys.stderr, flush=True)

    yield print_line


def _read_prepared(folder: Path, dataset: str) -> PreparedData | None:
    """The prepared data set in a folder; None if there is none or its manifest is damaged, so that it is made again."""
    try:
        return prepared.read_manifest(folder, dataset)
    except PreparationError:
        return None


def _print_summary(data: PreparedData, outcome: str) -> int:
    """Print what has been prepared, and how to use it; returns the exit status."""
    counts = ", ".join(f"{count:,} {name}" for name, count in data.counts.items())
    print(f"{data.dataset}, {outcome} in {data.folder}: {counts}; content {data.content}")
    if not data.complete:
        print(f"not the complete published data set ({data.missing_data}): runs on it are marked as modified")
    if os.environ.get(prepared.ROOT_VARIABLE) is None and data.folder.parent != prepared.default_root():
        print(f"add data={data.folder.parent} to run.py's arguments, or set {prepared.ROOT_VARIABLE}")
    return 0


def _prepare_fashion_mnist() -> int:
    """Install Debian's package if possible, then load the data once; returns the exit status."""
    # Imported only here: the other data sets need no torch.
    from workloads.data import fashion_mnist

    # apt-get needs root. If it fails, `load_splits` still has the hub.
    if not fashion_mnist.DEBIAN.is_dir() and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "dataset-fashion-mnist"]):
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                print(f"{' '.join(command)} failed; trying the hub", file=sys.stderr)
                break
    try:
        source, splits = fashion_mnist.load_splits("auto")
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(split.labels)} {name}" for name, split in splits.items())
    print(f"Fashion-MNIST from {source}: {counts} images, the content hash matches")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
