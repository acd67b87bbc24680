"""The folders of trials below a folder of records, on the disk or in archives, with what was read of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import ManifestError, UserError
from harness.records.archive import LARGEST_MEMBER, read_archive
from harness.records.layout import (
    ARCHIVE_SUFFIX,
    EVALUATIONS,
    FRAMEWORKS,
    MANIFEST,
    folder_of_archive,
    split_workload_name,
    study_number,
    trial_number,
)
from harness.records.manifest import Manifest
from harness.records.status import Status

LARGEST_MANIFEST = 4 * 2**20
"""Bytes of a manifest. A real one has 10 KB, and some more for the tracebacks of a trial that crashed."""

A_LINK = "refused: a link; put the files themselves there"


@dataclass(frozen=True)
class Problem:
    """Something missing, repaired or refused."""

    path: str
    """Of the trial's folder below the folder of records, or the name of a workload or submission."""
    message: str


@dataclass
class TrialFolder:
    """A folder that is named like a trial's, on the disk or in an archive, with what was read of it."""

    path: Path
    """In an archive: where the folder would be if it were unpacked."""
    shown: str
    """Its path below the folder of records."""
    submission: str
    workload: str
    framework: str
    study: int
    trial: int
    files: frozenset[str]
    packed: dict[str, bytes] | None = None
    """The contents of `files` where they lie in an archive."""
    manifest: Manifest | None = None

    def read(self, name: str) -> bytes:
        """The start of a file, to one byte more than a record can have. Raises OSError."""
        if self.packed is not None:
            return self.packed[name]
        # A third of the time of Path.open, over thousands of files.
        with open(self.path / name, "rb") as file:  # noqa: PTH123
            return file.read(LARGEST_MEMBER + 1)

    @property
    def declared_status(self) -> Status | None:
        """The status by its manifest, None without one."""
        return self.manifest.status if self.manifest is not None else None

    @property
    def is_modified(self) -> bool:
        """Whether facts of its workload were overridden."""
        return self.manifest is not None and bool(self.manifest.modified)

    @property
    def machine(self) -> str | None:
        """What the trial ran on by its manifest, whatever its folder is called; None without a manifest."""
        if self.manifest is None or not self.manifest.machine:
            return None
        return self.manifest.machine_folder or self.path.parents[3].name

    @property
    def stopped_at_another_target(self) -> float | None:
        """The target at which the trial stopped, where it did not go on to the end of its budget; else None."""
        manifest = self.manifest
        if manifest is None or manifest.status is not Status.REACHED or manifest.config.get("run_to_end") is not False:
            return None
        return manifest.target

    def final(self, key: str) -> float:
        """A figure of the manifest, NaN where there is none."""
        final = self.manifest.final if self.manifest is not None else None
        value = getattr(final, key, None)
        return float(value) if value is not None else np.nan


def find_trials(root: Path, problems: list[Problem]) -> list[TrialFolder]:
    """Every folder below `root` that is named like a trial's, at any depth, in archives too.

    problems: what was refused is added to it. Raises UserError if `root` is neither a folder nor an archive.
    """
    if root.name.endswith(ARCHIVE_SUFFIX) and root.is_file():
        archive = root.resolve()
        return _find_packed_trials(archive, len(str(archive.parent)) + 1, problems)
    if not root.is_dir():
        raise UserError(f"{root} is neither a folder of records nor an archive (.tar.xz); give one of the two")
    trials: list[TrialFolder] = []
    archives: list[Path] = []
    pending = [str(root.resolve())]
    root_length = len(pending[0]) + 1
    misplaced: dict[str, int] = {}
    """Number of folders that are named like a trial's, by the folder that they lie in without that of a study."""
    while pending:
        folder = pending.pop()
        for entry in _list_folder(folder, problems):
            # Folders of processes that pack or unpack have copies of records in them.
            if entry.name.startswith("."):
                continue
            # Links are not followed: one to a folder above would never end, and one to elsewhere brings what nobody
            # sent.
            if entry.is_symlink():
                if entry.is_dir() or entry.name.endswith(ARCHIVE_SUFFIX):
                    problems.append(Problem(entry.path[root_length:], A_LINK))
                continue
            if not entry.is_dir(follow_symlinks=False):
                if entry.name.endswith(ARCHIVE_SUFFIX) and entry.is_file(follow_symlinks=False):
                    archives.append(Path(entry.path))
                continue
            study = study_number(entry.name)
            if trial_number(entry.name) is not None:
                misplaced[folder] = misplaced.get(folder, 0) + 1
            elif study is None:
                pending.append(entry.path)
            else:
                submission = os.path.basename(folder)  # noqa: PTH119
                trials += _find_trials_of_study(entry.path, submission, study, root_length, problems)
    for folder, count in sorted(misplaced.items()):
        message = f"{count} trials left out: not in a folder study_<number>/<workload>_pytorch; give it its name back"
        problems.append(Problem(folder[root_length:] or ".", message))
    packed = [trial for archive in archives for trial in _find_packed_trials(archive, root_length, problems)]
    return trials + _without_copies(packed, trials)


def _find_packed_trials(archive: Path, root_length: int, problems: list[Problem]) -> list[TrialFolder]:
    """The trials of an archive. root_length: of the prefix that messages leave out of a path."""
    content = read_archive(archive)
    problems += [Problem(str(archive)[root_length:], problem) for problem in content.problems]
    folder = folder_of_archive(archive)
    trials = []
    for name, trial in sorted(content.trials.items()):
        path = folder / name
        parts = (folder.name, trial.workload, trial.framework, trial.study, trial.trial, frozenset(trial.files))
        trials.append(TrialFolder(path, str(path)[root_length:], *parts, packed=trial.files))
    return trials


def _without_copies(packed: list[TrialFolder], trials: list[TrialFolder]) -> list[TrialFolder]:
    """The packed trials without those that lie beside the archive in a folder, to the byte; of such a trial that
    differs, the folder counts, and the packed one becomes a duplicate with the archive in its path."""
    folders = {trial.path: trial for trial in trials} if packed else {}
    kept = []
    for trial in packed:
        folder = folders.get(trial.path)
        if folder is not None:
            try:
                if all(name in folder.files and folder.read(name) == trial.read(name) for name in trial.files):
                    continue
            except OSError:
                pass  # the folder's own problem, reported where its files are read
            submission, *rest = trial.shown.rsplit("/", 3)
            trial.shown = "/".join([submission + ARCHIVE_SUFFIX, *rest])
        kept.append(trial)
    return kept


def _find_trials_of_study(
    folder: str, submission: str, study: int, root_length: int, problems: list[Problem]
) -> list[TrialFolder]:
    """The trials of a folder study_<i>. root_length: of the prefix that messages leave out of a path."""
    trials = []
    for entry in _list_folder(folder, problems):
        if entry.is_symlink():
            problems.append(Problem(entry.path[root_length:], A_LINK))
        if not entry.is_dir(follow_symlinks=False):
            continue
        workload, framework = split_workload_name(entry.name)
        if framework not in FRAMEWORKS or not workload:
            message = "refused: not named <workload>_jax or <workload>_pytorch"
            problems.append(Problem(entry.path[root_length:], message))
            continue
        for inner in _list_folder(entry.path, problems):
            shown, number = inner.path[root_length:], trial_number(inner.name)
            if number is None or not inner.is_dir(follow_symlinks=False):
                if inner.name.startswith("trial"):
                    problems.append(Problem(shown, "refused: not a folder named trial_<number>"))
                continue
            files = _list_files(inner.path, shown, problems)
            trial = TrialFolder(Path(inner.path), shown, submission, workload, framework, study, number, files)
            trials.append(trial)
    return trials


def _list_files(folder: str, shown: str, problems: list[Problem]) -> frozenset[str]:
    """The names of the files of a trial. Of those that are read, only regular files: a named pipe would never end, and
    a link can lead anywhere."""
    names = []
    for entry in _list_folder(folder, problems):
        if entry.name in (EVALUATIONS, MANIFEST) and not entry.is_file(follow_symlinks=False):
            problems.append(Problem(shown, f"{entry.name} refused: no regular file"))
        else:
            names.append(entry.name)
    return frozenset(names)


def _list_folder(path: str, problems: list[Problem]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            # The file system's own order differs between machines, and problems are listed in this one.
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(path, f"cannot be listed: {error.strerror}"))
        return []


def read_manifest(trial: TrialFolder, problems: list[Problem]) -> Manifest | None:
    """The manifest of a trial; None, and a line in `problems`, if it cannot be used."""
    try:
        content = trial.read(MANIFEST)
        if len(content) > LARGEST_MANIFEST:
            raise ManifestError(f"larger than {LARGEST_MANIFEST >> 20} MiB")
        return Manifest.parse(content)
    except ManifestError as error:
        reason = str(error)
    except OSError as error:
        reason = str(error.strerror)
    problems.append(Problem(trial.shown, f"{MANIFEST} ignored: {reason}"))
    return None
