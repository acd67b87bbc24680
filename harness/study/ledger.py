"""The ledger: the planned trials of a folder of records, and the state of each.

The records are the truth. A plan beside them (`RecordPath.plan`) lists the trials of a study before they have begun.
Everything else is read off the trials' folders: a manifest gives the status, a live lease shows that a process is at
it. So any number of processes, on machines that share the file system, agree without talking to each other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.config.schema import NOT_RECORDED, Run
from harness.config.study_trials import configure_trial, list_trials
from harness.errors import ManifestError, UserError
from harness.files import write_atomically
from harness.hashing import stable_hash
from harness.records.archive import ArchivedSubmission, read_archive
from harness.records.differences import differences
from harness.records.layout import (
    MANIFEST,
    RecordPath,
    archive_of_folder,
    list_submission_folders,
    list_trials_of_submission,
)
from harness.records.lease import Lease, current_holder
from harness.records.manifest import FinalFigures, Manifest, ManifestSummary
from harness.records.packing import exclusive_access, unpack_if_packed
from harness.records.plan import PLAN_FORMAT, PLAN_FORMAT_VERSION, parse_plan
from harness.records.status import Status

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """Where a planned trial stands, from the point of view of workers."""

    PLANNED = "planned"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Begun, and no process is running it."""
    TO_RETRY = "to retry"
    """It crashed, and the ruleset allows another try."""
    OVER = "over"
    """It has ended, with a status."""


CLAIMABLE = (Phase.PLANNED, Phase.INTERRUPTED, Phase.TO_RETRY)
"""Phases of trials that a worker may take."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial of the ledger."""

    study: Run
    """The configuration of its study, without the point that the trial tries."""
    path: RecordPath
    packed: ManifestSummary | None = field(default=None, compare=False)
    """Of the manifest of a trial that lies in an archive."""

    @property
    def run(self) -> Run:
        """The configuration of the trial itself."""
        return configure_trial(self.study, self.path.study, self.path.trial)

    @property
    def name(self) -> str:
        """For messages: `adamw on gpt2, study 0, trial 1`."""
        return f"{self.path.label} on {self.path.workload}, study {self.path.study}, trial {self.path.trial}"


@dataclass(frozen=True)
class TrialState:
    """The state of a trial at one moment."""

    phase: Phase
    manifest: ManifestSummary | None
    """None for a trial that has not begun."""
    worker: str = ""
    """Of a running trial: executor, host and process."""

    @property
    def name(self) -> str:
        """The phase, or for a trial that is over its status."""
        return str(self.manifest.status if self.is_over and self.manifest is not None else self.phase)

    @property
    def final(self) -> FinalFigures:
        """The final figures of the trial; empty while it has none."""
        return self.manifest.final if self.manifest is not None and self.manifest.final is not None else FinalFigures()

    @property
    def is_claimable(self) -> bool:
        """Whether a worker may take the trial."""
        return self.phase in CLAIMABLE

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended for good."""
        return self.phase is Phase.OVER


def read_state(trial: PlannedTrial) -> TrialState:
    """The present state of the trial; raises UserError if its manifest cannot be read."""
    try:
        manifest = ManifestSummary.read(f"{trial.path.folder_string}/{MANIFEST}")
    except ManifestError as error:
        raise UserError(
            f"{trial.path.manifest} cannot be read ({error}); move the folder away to run the trial again"
        ) from error
    return judge_state(trial, manifest)


def judge_state(trial: PlannedTrial, manifest: ManifestSummary | None) -> TrialState:
    """The state of the trial by its manifest, which was just read or has not changed since, and its lease."""
    # The folder counts where there is one: it can be unpacked since the archive was read.
    manifest = manifest or trial.packed
    is_finished = manifest is not None and manifest.status.is_finished
    can_retry = (
        manifest is not None and manifest.status.is_crash and len(manifest.failures) < trial.study.ruleset.retries
    )
    if is_finished and not can_retry:
        return TrialState(Phase.OVER, manifest)
    # A trial that ends between the two looks appears as interrupted; a worker reads the state again with the lease.
    holder = current_holder(trial.path.folder)
    if holder is not None:
        worker = f"{holder.executor} {holder.host.split(' ')[0]} {holder.pid}".strip()
        return TrialState(Phase.RUNNING, manifest, worker)
    if can_retry:
        return TrialState(Phase.TO_RETRY, manifest)
    return TrialState(Phase.PLANNED if manifest is None else Phase.INTERRUPTED, manifest)


def enumerate_trials(runs: Iterable[Run], machine: str, report: Callable[[str], None] = print) -> list[PlannedTrial]:
    """Every trial that `runs` ask for, in running order. machine: the machine's folder name.

    Nothing is planned. A submission that is packed is unpacked, so that its trials are not run anew; `report` is told
    so in a line.

    Raises UserError where a folder is planned for another configuration, unless overwrite=true.
    """
    messages: list[str] = []
    trials: dict[Path, PlannedTrial] = {}
    for run in runs:
        first = RecordPath.of_run(run, machine)
        unpack_if_packed(first.submission_folder, report)
        if not run.overwrite and first.plan.exists():
            differing = differences(_read_plan(first.plan)["identity"], _study_identity(run))
            if differing:
                messages.append(
                    f"{first.submission_folder} holds a study of another configuration ({'; '.join(differing)}); give "
                    "label=NAME for a folder of its own, or overwrite=true to replace it"
                )
        for seed, number in list_trials(run):
            trial = PlannedTrial(run, first.sibling(seed, number))
            # By folder: runs of a sweep may ask for the same trial twice.
            trials[trial.path.folder] = trial
    if messages:
        raise UserError(messages)
    # Ordered by study and shuffled deterministically within a study, so that a temporary slowdown affects all
    # submissions.
    return sorted(trials.values(), key=lambda trial: (trial.path.study, stable_hash(trial.name)))


def plan(runs: Iterable[Run], machine: str, report: Callable[[str], None] = print) -> list[PlannedTrial]:
    """Write the trials that `runs` ask for into their plans, beside the trials already planned; otherwise as
    `enumerate_trials`.

    With overwrite=true a study's former trials are discarded first.
    """
    runs = list(runs)
    # Of all runs, so that a problem of the last one is found before anything is written.
    trials = enumerate_trials(runs, machine, report)
    for run in runs:
        path = RecordPath.of_run(run, machine)
        of_run = [trial for trial in trials if trial.study is run]
        former = _read_planned_trials(path.plan)
        if run.overwrite or not _is_planned(path.plan, run, former, of_run):
            # Another command may plan the same submission at the same time, and neither must lose the trials of the
            # other.
            with _plan_access(path):
                former = _read_planned_trials(path.plan)
                if run.overwrite:
                    _discard({trial.path.folder: trial for trial in [*former, *of_run]}.values())
                    former = []
                _write_plan(path.plan, run, [*former, *of_run])
        logger.info("%s: %d trials asked for, %d planned before", path.plan, len(of_run), len(former))
    return trials


def list_all_trials(records: Path) -> tuple[list[PlannedTrial], list[str]]:
    """Every trial below `records`, planned or only recorded (a command that runs a single trial writes no plan), in
    folders and archives, and a message for each folder or archive that cannot be read. Nothing is unpacked."""
    if not records.is_dir():
        raise UserError(f"{records} is not a folder; give a folder of records")
    trials: list[PlannedTrial] = []
    messages: list[str] = []
    for folder in list_submission_folders(records):
        archive = archive_of_folder(folder)
        packed = read_archive(archive) if archive.is_file() else ArchivedSubmission()
        messages += [f"{archive}: {problem}" for problem in packed.problems]
        trials += _list_trials_of_submission(folder, packed, messages)
    return trials, messages


def _list_trials_of_submission(folder: Path, packed: ArchivedSubmission, messages: list[str]) -> Iterable[PlannedTrial]:
    """The trials of a submission, of its plans first. A file of the folder counts before that of the archive."""
    # By place, and not by folder, which takes time to make.
    trials: dict[tuple[int, str, int], PlannedTrial] = {}
    for plan_path in sorted({*folder.glob("plan_*.json"), *(folder / name for name in packed.plans)}):
        try:
            content = packed.plans.get(plan_path.name)
            plan = _read_plan(plan_path) if content is None or plan_path.exists() else parse_plan(content, plan_path)
            trials |= {_place(trial.path): trial for trial in _planned_trials(plan, plan_path)}
        except UserError as error:
            messages += error.messages
    # One manifest for each workload: the trials of a submission on it share the configuration of their study.
    studies: dict[str, Run] = {}

    def add(path: RecordPath, content: bytes | None, archived: ManifestSummary | None) -> None:
        """Add the trial whose manifest has this content; None: what lies in its folder."""
        if path.workload not in studies:
            manifest = Manifest.read(path.manifest) if content is None else Manifest.parse(content)
            # A worker has just made the folder.
            if manifest is None:
                return
            studies[path.workload] = _study_from_config(manifest.config, folder)
        trials[_place(path)] = PlannedTrial(studies[path.workload], path, archived)

    for path in list_trials_of_submission(folder):
        if _place(path) in trials or not path.manifest.exists():
            continue
        try:
            add(path, None, None)
        except (ManifestError, ValueError, TypeError) as error:
            messages.append(f"{path.manifest} cannot be read ({str(error).splitlines()[0]}); left out")
    for trial in packed.trials.values():
        path = RecordPath.below(folder, trial.study, trial.workload, trial.trial)
        if MANIFEST not in trial.files or path.manifest.exists():
            continue
        try:
            archived = ManifestSummary.parse(trial.files[MANIFEST])
            if _place(path) in trials:
                trials[_place(path)] = replace(trials[_place(path)], packed=archived)
            else:
                add(path, trial.files[MANIFEST], archived)
        except (ManifestError, ValueError, TypeError) as error:
            messages.append(f"{path.manifest} cannot be read ({str(error).splitlines()[0]}); left out")
    return trials.values()


def _place(path: RecordPath) -> tuple[int, str, int]:
    """What tells a trial of a submission from its others."""
    return path.study, path.workload, path.trial


def record_crash(
    trial: PlannedTrial, reason: str, stop_reason: str | None = None, check: Callable[[], None] = lambda: None
) -> None:
    """Note in the manifest that the process of a trial ended without writing why, with status `failed` once the
    ruleset's retries are used up. stop_reason: a sentence for the reader of a status, where the process was killed.
    check: called immediately before it is written; where it raises, it is not.

    To be called while holding the trial's lease. Raises FileNotFoundError where the trial has no manifest yet.
    """
    manifest = Manifest.read(trial.path.manifest)
    if manifest is None:
        raise FileNotFoundError(trial.path.manifest)
    # With retries left the status stays as it is, unfinished, so that a worker takes the trial again.
    if len(manifest.failures) >= trial.study.ruleset.retries:
        manifest.status = Status.FAILED
        manifest.final = FinalFigures(stop_reason=stop_reason, traceback=reason)
        logger.info("%s: failed, after %d retries", trial.name, len(manifest.failures))
    else:
        logger.info("%s: retry %d of %d", trial.name, len(manifest.failures) + 1, trial.study.ruleset.retries)
        manifest.failures = [*manifest.failures, reason]
    manifest.write(trial.path.manifest, check)


# ---- plans on disk -------------------------------------------------------------------------------------------------


def _study_identity(run: Run) -> dict[str, Any]:
    identity = run.identity()
    # A study may grow by further seeds and trials.
    del identity["seed"], identity["trial"]
    # As it comes back from JSON, where tuples are lists.
    return dict(json.loads(json.dumps(identity)))


def _plan_content(run: Run, trials: Iterable[PlannedTrial]) -> dict[str, Any]:
    """The plan with these trials, as it comes back from JSON."""
    content = {
        "format": PLAN_FORMAT,
        "format_version": PLAN_FORMAT_VERSION,
        "identity": _study_identity(run),
        "trials": sorted({(trial.path.study, trial.path.trial) for trial in trials}),
        "overridden": run.overridden,
        "config": run.model_dump(mode="json", exclude=NOT_RECORDED),
    }
    return dict(json.loads(json.dumps(content)))


def _is_planned(path: Path, run: Run, former: Iterable[PlannedTrial], trials: Iterable[PlannedTrial]) -> bool:
    """Whether the plan at `path`, with the trials `former`, says already what `run` asks for."""
    if not path.exists():
        return False
    written, content = _read_plan(path), _plan_content(run, [*former, *trials])
    # Other keys that may differ are documentation, such as the provenance of a target. A plan with the same content is
    # left alone, so that a command that only reads committed records changes no file.
    return all(written.get(key) == content[key] for key in ("identity", "trials", "overridden"))


@contextmanager
def _plan_access(path: RecordPath) -> Iterator[None]:
    """Within it no other process writes a plan of the submission, packs it or unpacks it."""
    try:
        path.machine_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable_plan(path.plan, path.records, error) from error
    with exclusive_access(path.submission_folder):
        yield


def _write_plan(path: Path, run: Run, trials: list[PlannedTrial]) -> None:
    """Write the plan at `path`. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_plan_content(run, trials), indent=1) + "\n")
    except OSError as error:
        raise _unwritable_plan(path, run.records, error) from error


def _unwritable_plan(path: Path, records: Path, error: OSError) -> UserError:
    return UserError(
        f"records={records}: {path} cannot be written ({error.strerror}); give another folder with records="
    )


def _read_planned_trials(path: Path) -> list[PlannedTrial]:
    """The trials of the plan at `path`, none where it is not there."""
    return _planned_trials(_read_plan(path), path) if path.exists() else []


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return parse_plan(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and the same command plans again") from error


def _planned_trials(content: dict[str, Any], path: Path) -> list[PlannedTrial]:
    """The trials of the plan at `path`, which has this content."""
    try:
        study = _study_from_config(content["config"], path.parent)
    except ValueError as error:
        raise UserError(f"{path} is of a version of Pacemark with other keys ({str(error).splitlines()[0]})") from error
    study = study.model_copy(update={"overridden": tuple(content["overridden"])})
    # By where the plan lies, and not by its configuration: the records may have been moved.
    workload = study.spec.full_name
    first = RecordPath.below(path.parent, 0, workload, 1)
    return [PlannedTrial(study, first.sibling(seed, number)) for seed, number in content["trials"]]


def _study_from_config(config: dict[str, Any], folder: Path) -> Run:
    """The run of a study from its configuration on disk. folder: of the submission, which may have been moved."""
    not_recorded = {"records": folder.parents[3], "overwrite": False, "debug": False, "label": folder.name}
    return Run(**config | not_recorded)


def _discard(trials: Iterable[PlannedTrial]) -> None:
    """Delete the records of the trials: of all, or of none where another process writes one of them (UserError)."""
    # All leases before the first file is deleted, so that nothing is lost where one of them is held.
    leases = []
    try:
        for trial in trials:
            if not trial.path.folder.exists():
                continue
            lease = Lease.acquire(trial.path.folder)
            if lease is None:
                raise UserError(f"{trial.path.folder} is being written by another process; wait for it, or stop it")
            leases.append((lease, trial.path))
        for _, path in leases:
            logger.info("%s: discarded, since overwrite=true", path.folder)
            for file in (path.manifest, path.evaluations, path.checkpoint):
                file.unlink(missing_ok=True)
    finally:
        for lease, _ in leases:
            lease.release()
