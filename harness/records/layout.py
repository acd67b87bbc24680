"""The folder layout of records, which is AlgoPerf's:

    <records>/<scale>/<ruleset>/<machine>/<label>/
        plan_<workload>.json                                the trials of a study that are planned
        study_<seed>/<workload>_pytorch/trial_<number>/
            .lease/<token>                                  while a process is at it
            .kills                                          after a kill of its process, until the trial is finished
            eval_measurements.csv                           one row per evaluation
            manifest.json                                   all else
            sources.json                                    the submission's source files by module, where they are no
                                                            part of Pacemark
            weights_at_target.pt, weights_at_end.pt         with judge=replay: the weights of these evaluations
            checkpoint.pt                                   until the trial is finished
    <records>/<scale>/<ruleset>/<machine>/<label>.tar.xz    in the place of the folder: its files, packed (archive.py)

<label> is the submission's name, plus a hash of its configuration where it is not the shipped one, or what `label=`
says. <workload> has the name of the variant in it: gpt2, or gpt2_silu.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.config.schema import Run

EVALUATIONS, MANIFEST, CHECKPOINT = "eval_measurements.csv", "manifest.json", "checkpoint.pt"
SOURCES, WEIGHTS_AT_TARGET, WEIGHTS_AT_END = "sources.json", "weights_at_target.pt", "weights_at_end.pt"
FILES = (EVALUATIONS, MANIFEST, CHECKPOINT, SOURCES, WEIGHTS_AT_TARGET, WEIGHTS_AT_END)
"""That a trial writes into its folder."""
KILLS = ".kills"
ARCHIVE_SUFFIX = ".tar.xz"
"""Of the archive that lies in the place of a submission's folder."""
FRAMEWORKS = ("jax", "pytorch")
"""Suffixes of a workload's folder: AlgoPerf has both, our records have the second."""

# Ten digits hold any seed that `Run.seed` allows.
_STUDY = re.compile(r"study_(\d{1,10})")
_TRIAL = re.compile(r"trial_(\d{1,9})")


@dataclass(frozen=True)
class RecordPath:
    """Where the record of a trial lies, by its parts."""

    records: Path
    scale: str
    ruleset: str
    machine: str
    label: str
    study: int
    workload: str
    """With the variant: gpt2, or gpt2_silu."""
    trial: int

    @classmethod
    def of_run(cls, run: Run, machine: str) -> RecordPath:
        """Of the trial that `run` describes. machine: name of the machine's folder where the run has `auto`."""
        return cls(
            run.records,
            run.scale_folder,
            run.ruleset.name,
            machine if run.machine == "auto" else run.machine,
            run.submission_label,
            run.seed,
            run.spec.full_name,
            run.trial,
        )

    @classmethod
    def parse(cls, folder: Path) -> RecordPath | None:
        """From the folder of a trial; None if it is not named like one."""
        # From <scale> to trial_<number>; the folder of records can be the working directory, without a part of its own.
        if len(folder.parts) < 7:
            return None
        *_, study_name, workload_name, trial_name = folder.parts
        study, trial = study_number(study_name), trial_number(trial_name)
        workload, framework = split_workload_name(workload_name)
        if study is None or trial is None or framework not in FRAMEWORKS:
            return None
        return cls.below(folder.parents[2], study, workload, trial)

    @classmethod
    def below(cls, submission_folder: Path, study: int, workload: str, trial: int) -> RecordPath:
        """Of a trial of the submission whose folder is given."""
        *_, scale, ruleset, machine, label = submission_folder.parts
        return cls(submission_folder.parents[3], scale, ruleset, machine, label, study, workload, trial)

    @property
    def machine_folder(self) -> Path:
        """The folder of all submissions that ran on the machine: in AlgoPerf's words, a submission directory."""
        return self.records / self.scale / self.ruleset / self.machine

    @property
    def submission_folder(self) -> Path:
        """The folder of all studies of the submission."""
        return self.machine_folder / self.label

    @property
    def plan(self) -> Path:
        """The file that lists the planned trials of the submission on the workload."""
        return self.submission_folder / f"plan_{self.workload}.json"

    @property
    def study_folder(self) -> Path:
        """The folder of the trials of the study on the workload."""
        return self.submission_folder / f"study_{self.study}" / f"{self.workload}_pytorch"

    @property
    def folder_string(self) -> str:
        """The trial's own folder as a string: of a hundred thousand trials, making paths takes longer than reading."""
        return (
            f"{self.records}/{self.scale}/{self.ruleset}/{self.machine}/{self.label}/study_{self.study}/"
            f"{self.workload}_pytorch/trial_{self.trial}"
        )

    @cached_property
    def folder(self) -> Path:
        """The trial's own folder."""
        return Path(self.folder_string)

    @property
    def evaluations(self) -> Path:
        """The CSV of evaluations."""
        return self.folder / EVALUATIONS

    @property
    def manifest(self) -> Path:
        """The JSON of all else."""
        return self.folder / MANIFEST

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from which an unfinished trial goes on."""
        return self.folder / CHECKPOINT

    def sibling(self, study: int, trial: int) -> RecordPath:
        """Another trial of the same submission on the same workload."""
        # Not dataclasses.replace, which takes five times as long.
        return RecordPath(self.records, self.scale, self.ruleset, self.machine, self.label, study, self.workload, trial)

    def trials_of_study(self) -> Iterator[RecordPath]:
        """Every trial of the study that has a folder, this one included, sorted by the folder's name."""
        yield from _parse_all(self.study_folder.glob("trial_*"))

    def trials_on_workload(self) -> Iterator[RecordPath]:
        """Every trial of any submission of the machine on the workload, sorted by the folder's name."""
        yield from _parse_all(self.machine_folder.glob(f"*/study_*/{self.workload}_pytorch/trial_*"))


def list_submission_folders(records: Path) -> list[Path]:
    """The folders <scale>/<ruleset>/<machine>/<label> below a folder of records, sorted; those too that are packed."""
    paths = [path for path in records.glob("*/*/*/*") if not path.name.startswith(".")]
    archives = (path for path in paths if path.name.endswith(ARCHIVE_SUFFIX) and path.is_file())
    return sorted({*(path for path in paths if path.is_dir()), *map(folder_of_archive, archives)})


def archive_of_folder(folder: Path) -> Path:
    """The archive that can lie in the place of a submission's folder."""
    return folder.with_name(folder.name + ARCHIVE_SUFFIX)


def folder_of_archive(archive: Path) -> Path:
    """The submission's folder in whose place the archive lies."""
    return archive.with_name(archive.name.removesuffix(ARCHIVE_SUFFIX))


def list_trials_of_submission(folder: Path) -> list[RecordPath]:
    """Every trial that has a folder below the folder of a submission, sorted by the folder's name."""
    *_, scale, ruleset, machine, label = folder.parts
    records = folder.parents[3]
    listed: list[tuple[str, str, str, RecordPath]] = []
    # By names and not by paths: there can be a hundred thousand.
    for study_name in _list_folders(folder):
        if (study := study_number(study_name)) is None:
            continue
        for workload_name in _list_folders(folder / study_name):
            workload, framework = split_workload_name(workload_name)
            if framework != "pytorch":
                continue
            for name in _list_folders(folder / study_name / workload_name):
                if (trial := trial_number(name)) is not None:
                    path = RecordPath(records, scale, ruleset, machine, label, study, workload, trial)
                    listed.append((study_name, workload_name, name, path))
    return [path for *_, path in sorted(listed, key=lambda entry: entry[:3])]


def _list_folders(folder: Path) -> list[str]:
    """The names in a folder that can be those of folders; none where it is no folder, or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _parse_all(folders: Iterator[Path]) -> Iterator[RecordPath]:
    for folder in sorted(folders):
        path = RecordPath.parse(folder)
        if path is not None:
            yield path


def study_number(name: str) -> int | None:
    """3 for `study_3`; None for any other name."""
    match = _STUDY.fullmatch(name)
    return int(match[1]) if match else None


def trial_number(name: str) -> int | None:
    """3 for `trial_3`; None for any other name."""
    match = _TRIAL.fullmatch(name)
    return int(match[1]) if match else None


def split_workload_name(name: str) -> tuple[str, str]:
    """("gpt2_silu", "pytorch") for `gpt2_silu_pytorch`. Without an underscore the workload is empty."""
    # From the right, since a variant's name has an underscore of its own.
    workload, _, framework = name.rpartition("_")
    return workload, framework


def machine_folder_name(description: dict[str, Any]) -> str:
    """The name of a machine's folder: what its seconds depend on most. description: `machine` of a manifest. Raises
    KeyError where it lacks one of these."""
    if description["device"] == "cuda":
        words = f"{description['gpu_count']}x-{description['gpu']}"
    else:
        words = f"{description['cpu']}-{description['threads']}-thread" + ("s" if description["threads"] > 1 else "")
        words += f"-{description['ranks']}-ranks" if description.get("ranks", 1) > 1 else ""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
