"""Pack records for git, unpack them, and show what an archive holds.

    python scripts/records.py pack FOLDER...      each submission's folder becomes <label>.tar.xz
    python scripts/records.py unpack FOLDER...    and back; a command that runs trials does so by itself
    python scripts/records.py show ARCHIVE        as text, for review; git diff uses it, see docs/sending_records.md

FOLDER is a folder of records or a part of one. A submission with an unfinished trial is left as it is. Exit status 1 if
a submission was left, or an archive is damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.command_line import printable, run_script
from harness.errors import ManifestError, UserError
from harness.records.archive import ArchivedTrial, read_archive
from harness.records.layout import ARCHIVE_SUFFIX, EVALUATIONS, MANIFEST, study_number
from harness.records.manifest import Manifest
from harness.records.packing import pack, unpack

SHOWN_COLUMNS = ("global_step", "accumulated_submission_time")
"""Of the first and the last row, besides the metric."""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("pack", "unpack"):
        commands.add_parser(command).add_argument("paths", nargs="+", type=Path, metavar="FOLDER")
    commands.add_parser("show").add_argument("archive", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "show":
        if not options.archive.is_file():
            raise UserError(f"{options.archive} is no file; give an archive <label>{ARCHIVE_SUFFIX}")
        for line in describe_archive(options.archive):
            # Control characters of a stranger's archive are not for the terminal.
            print(printable(line))
        # Always 0: git diff shows nothing of a file whose text conversion fails.
        return 0
    packs = options.command == "pack"
    done, messages = 0, []
    list_paths = _list_folders if packs else _list_archives
    for path in [path for given in options.paths for path in list_paths(given)]:
        try:
            done += bool(pack(path) if packs else unpack(path))
        except UserError as error:
            messages += error.messages
    print(f"{done} submissions {options.command}ed")
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    return int(bool(messages))


def _list_folders(folder: Path) -> list[Path]:
    """The folders of submissions at or below `folder`: those that hold a folder study_<seed>."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of records")
    studies = (path for path in folder.rglob("study_*") if study_number(path.name) is not None and path.is_dir())
    # A hidden folder belongs to a process that packs or unpacks.
    folders = {path.parent for path in studies if "/." not in f"/{path.relative_to(folder).as_posix()}"}
    if not folders:
        raise UserError(f"{folder} holds no folder study_<seed>; give a folder of records that are not packed")
    return sorted(folders)


def _list_archives(path: Path) -> list[Path]:
    archives = [path] if path.is_file() else sorted(path.rglob(f"*{ARCHIVE_SUFFIX}"))
    if not archives or not all(archive.name.endswith(ARCHIVE_SUFFIX) for archive in archives):
        raise UserError(f"{path} holds no archive <label>{ARCHIVE_SUFFIX}; give a folder of packed records")
    return archives


def describe_archive(archive: Path) -> Iterator[str]:
    """What an archive holds: a line for each plan and problem, and four for each trial. Every change of a file changes
    a line, since each has the start of the file's SHA-256."""
    content = read_archive(archive)
    for problem in content.problems:
        yield f"PROBLEM {problem}"
    for name, plan in sorted(content.plans.items()):
        yield f"{name}, sha256 {_digest(plan)}"
    for name, trial in sorted(content.trials.items()):
        yield from _describe_trial(name, trial)


def _describe_trial(name: str, trial: ArchivedTrial) -> Iterator[str]:
    metric = "validation/loss"
    if MANIFEST in trial.files:
        try:
            manifest = Manifest.parse(trial.files[MANIFEST])
        except ManifestError as error:
            yield f"{name}: PROBLEM {MANIFEST}: {error}"
        else:
            metric = manifest.metric
            yield f"{name}: {', '.join(_manifest_parts(manifest))}, sha256 {_digest(trial.files[MANIFEST])}"
            yield f"    hyperparameters {_listed(manifest.hyperparameters)}"
    else:
        yield f"{name}: PROBLEM no {MANIFEST}"
    if EVALUATIONS not in trial.files:
        yield f"    PROBLEM no {EVALUATIONS}"
        return
    header, *rows = trial.files[EVALUATIONS].decode("utf-8", errors="replace").splitlines() or [""]
    yield f"    {len(rows)} evaluations, sha256 {_digest(trial.files[EVALUATIONS])}"
    columns = header.split(",")
    for when, row in (("first", rows[0]), ("last", rows[-1])) if rows else ():
        cells = dict(zip(columns, row.split(","), strict=False))
        yield f"    {when:5} " + _listed({key: cells.get(key, "") for key in (*SHOWN_COLUMNS, metric)})


def _manifest_parts(manifest: Manifest) -> Iterator[str]:
    final = manifest.final
    yield str(manifest.status)
    if final is not None and final.steps_to_target is not None:
        yield f"{final.steps_to_target:g} steps to target"
    yield f"{manifest.metric} {manifest.target:g}"
    yield f"workload version {manifest.workload_version}, target version {manifest.target_version}"
    if manifest.modified:
        yield f"modified {' '.join(manifest.modified)}"
    if (rule := manifest.config.get("pruning", "none")) != "none":
        yield f"pruning {rule}"
    yield f"on {manifest.machine_folder or 'an unknown machine'}"
    yield f"commit {str(manifest.code.get('commit'))[:12]}{' with changes' if manifest.code.get('modified') else ''}"
    yield f"torch {manifest.packages.get('torch')}"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in values.items())


def _number(value: Any) -> str:
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError):
        return str(value)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
