"""The ledger: which trials are planned in a folder of records, and how far each is.

The records are the truth. A plan beside them says which trials belong to a study before they have begun:

    <records>/<scale>/<ruleset>/<machine>/<label>/plan_<workload>[_<variant>].json

Everything else is read off the trials' folders: a manifest tells the status, a living lease that somebody is at it. So
any number of processes, on machines that share the file system, agree without talking to each other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import study
from harness.config import Run
from harness.lease import Lease, holder_of
from harness.problems import UserError
from harness.record import NOT_RECORDED, Status, differences, replace, submission_folder
from harness.seeding import stable_hash

FORMAT = "pacemark-plan"
FORMAT_VERSION = 1
OPEN = ("planned", "interrupted", "to retry")
"""States of trials that a worker may take."""


@dataclass(frozen=True)
class Entry:
    """A planned trial. `base` is the run of its study, without the point that the trial tries."""

    base: Run
    seed: int
    trial: int
    folder: Path

    @property
    def run(self) -> Run:
        return study.trial_of(self.base, self.seed, self.trial)

    @property
    def name(self) -> str:
        return f"{self.base.submission_label} on {self.base.facts.full_name}, study {self.seed}, trial {self.trial}"


@dataclass(frozen=True)
class State:
    """`name`: planned, running, interrupted, to retry, or the status with which the trial ended."""

    name: str
    manifest: dict[str, Any]
    worker: str = ""
    """Of a running trial: executor, host and process."""

    @property
    def is_open(self) -> bool:
        return self.name in OPEN

    @property
    def is_over(self) -> bool:
        return not self.is_open and self.name != "running"


def state_of(entry: Entry) -> State:
    """Where the trial stands at this moment; UserError if its manifest cannot be read."""
    try:
        manifest = json.loads((entry.folder / "manifest.json").read_text())
        status = Status(manifest["status"])
    except FileNotFoundError:
        manifest, status = {}, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{entry.folder / 'manifest.json'} cannot be read ({error}); move the folder away to run the trial again"
        ) from error
    failures = len(manifest.get("failures", []))
    over = status is not None and status.finished
    if over and not (status is not None and status.crashed and failures < entry.base.ruleset.retries):
        return State(str(status), manifest)
    holder = holder_of(entry.folder)
    if holder is not None:
        return State("running", manifest, f"{holder.executor} {holder.host.split(' ')[0]} {holder.pid}".strip())
    if over:
        return State("to retry", manifest)
    return State("planned" if status is None else "interrupted", manifest)


def progress_of(entry: Entry) -> float:
    """Share of the budget that a trial has behind it, as its rows tell."""
    try:
        with (entry.folder / "eval_measurements.csv").open() as file:
            rows = list(csv.DictReader(file))
        return float(rows[-1]["global_step"]) / entry.base.facts.max_steps if rows else 0.0
    except (OSError, KeyError, ValueError):
        return 0.0


def trials_of(runs: Iterable[Run], machine: str) -> list[Entry]:
    """Every trial that `runs` ask for, in running order; nothing is written.

    UserError where a folder is planned for another configuration, unless overwrite=true.
    """
    problems: list[str] = []
    order: dict[Path, Entry] = {}
    for run in runs:
        path = _plan_of(run, machine)
        if not run.overwrite and path.exists():
            found = differences(_read(path)["identity"], _identity(run))
            if found:
                problems.append(
                    f"{path.parent} holds a study of another configuration ({'; '.join(found)}); give label=NAME for a "
                    "folder of its own, or overwrite=true to replace it"
                )
        for seed, trial in study.trials_of(run):
            entry = _entry(run, path.parent, seed, trial)
            order[entry.folder] = entry
    if problems:
        raise UserError(problems)
    # Study by study, and within a study at random, always alike: what disturbs a machine for a while then meets all.
    return sorted(order.values(), key=lambda entry: (entry.seed, stable_hash(entry.name)))


def plan(runs: Iterable[Run], machine: str) -> list[Entry]:
    """Write down the trials that `runs` ask for, beside what is planned already; as `trials_of` otherwise.

    With overwrite=true a study's former trials are discarded first.
    """
    runs = list(runs)
    entries = trials_of(runs, machine)
    for run in runs:
        path = _plan_of(run, machine)
        own = [entry for entry in entries if entry.base is run]
        former = _entries(path) if path.exists() else []
        if run.overwrite:
            _discard({entry.folder: entry for entry in [*former, *own]}.values())
            former = []
        _write(path, run, [*former, *own])
    return entries


def listed(records: Path) -> tuple[list[Entry], list[str]]:
    """Every trial below `records`, planned or only recorded (a command's single trial is not planned), and a line for
    each folder that cannot be read."""
    if not records.is_dir():
        raise UserError(f"{records} is not a folder; give a folder of records")
    entries: list[Entry] = []
    problems: list[str] = []
    for folder in sorted(path for path in records.glob("*/*/*/*") if path.is_dir()):
        found: dict[Path, Entry] = {}
        for path in sorted(folder.glob("plan_*.json")):
            try:
                found |= {entry.folder: entry for entry in _entries(path)}
            except UserError as error:
                problems += error.problems
        bases: dict[str, Run] = {}
        for path in sorted(folder.glob("study_*/*_pytorch/trial_*")):
            if path in found:
                continue
            try:
                if path.parent.name not in bases:
                    bases[path.parent.name] = _base(json.loads((path / "manifest.json").read_text())["config"], folder)
                seed, trial = (int(part.name.rpartition("_")[2]) for part in (path.parents[1], path))
                found[path] = Entry(bases[path.parent.name], seed, trial, path)
            except FileNotFoundError:
                continue  # taken this moment
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{path / 'manifest.json'} cannot be read ({str(error).splitlines()[0]}); left out")
        entries += found.values()
    return entries, problems


def crashed(entry: Entry, what: str) -> None:
    """Note that the process of a trial ended without writing down why. Call it holding the trial's lease."""
    path = entry.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.setdefault("failures", []).append(what)
    if len(manifest["failures"]) > entry.base.ruleset.retries:
        manifest["failures"].pop()
        manifest |= {"status": str(Status.FAILED), "final": {"stop_reason": None, "traceback": what}}
    replace(path, (json.dumps(manifest, indent=2) + "\n").encode())


# ---- plans on disk -----------------------------------------------------------------------------------------------


def _plan_of(run: Run, machine: str) -> Path:
    return submission_folder(run, machine) / f"plan_{run.facts.full_name}.json"


def _identity(run: Run) -> dict[str, Any]:
    identity = run.identity()
    del identity["seed"], identity["trial"]
    return dict(json.loads(json.dumps(identity)))


def _entry(run: Run, folder: Path, seed: int, trial: int) -> Entry:
    return Entry(run, seed, trial, folder / f"study_{seed}" / f"{run.facts.full_name}_pytorch" / f"trial_{trial}")


def _write(path: Path, run: Run, entries: list[Entry]) -> None:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": _identity(run),
        "trials": sorted({(entry.seed, entry.trial) for entry in entries}),
        "overridden": run.overridden,
        "config": run.model_dump(mode="json", exclude=NOT_RECORDED),
    }
    text = json.dumps(content, indent=1) + "\n"
    try:
        if path.exists() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text.encode())
    except OSError as error:
        raise UserError(
            f"records={run.records}: {path} cannot be written ({error.strerror}); give another folder with records="
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            raise ValueError("of another format or version")
        return dict(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and the same command plans again") from error


def _entries(path: Path) -> list[Entry]:
    content = _read(path)
    try:
        base = _base(content["config"], path.parent)
    except ValueError as error:
        raise UserError(f"{path} is of a version of Pacemark with other keys ({str(error).splitlines()[0]})") from error
    base = base.model_copy(update={"overridden": tuple(content["overridden"])})
    return [_entry(base, path.parent, seed, trial) for seed, trial in content["trials"]]


def _base(config: dict[str, Any], folder: Path) -> Run:
    """The run of a study from its configuration on disk; folder: <records>/<scale>/<ruleset>/<machine>/<label>."""
    elsewhere = {"records": folder.parents[3], "overwrite": False, "debug": False, "label": folder.name}
    return Run(**config | elsewhere)


def _discard(entries: Iterable[Entry]) -> None:
    held = []
    try:
        for entry in entries:
            if not entry.folder.exists():
                continue
            lease = Lease.take(entry.folder)
            if lease is None:
                raise UserError(f"{entry.folder} is being written by another process; wait for it, or stop it")
            held.append(lease)
        for lease in held:
            for name in ("manifest.json", "eval_measurements.csv", "checkpoint.pt"):
                (lease.folder / name).unlink(missing_ok=True)
    finally:
        for lease in held:
            lease.release()
