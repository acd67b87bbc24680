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


def plan(runs: Iterable[Run], machine: str) -> list[Entry]:
    """Plan every trial that `runs` ask for, beside what is planned already; the trials of `runs`, in running order.

    UserError, before anything is written, where a folder is planned for another configuration. With overwrite=true a
    study's former trials are discarded first.
    """
    asked: list[tuple[Path, Run, list[Entry]]] = []
    problems: list[str] = []
    for run in runs:
        folder = submission_folder(run, machine)
        entries = [_entry(run, folder, seed, trial) for seed, trial in study.trials_of(run)]
        path = folder / f"plan_{run.facts.full_name}.json"
        if not run.overwrite and path.exists():
            found = differences(_read(path)["identity"], _identity(run))
            if found:
                problems.append(
                    f"{folder} holds a study of another configuration ({'; '.join(found)}); give label=NAME for a "
                    "folder of its own, or overwrite=true to replace it"
                )
        asked.append((path, run, entries))
    if problems:
        raise UserError(problems)
    several = sum(len(entries) for _, _, entries in asked) > 1
    for path, run, entries in asked:
        former = _entries(path) if path.exists() else []
        if run.overwrite and several:
            _discard({entry.folder: entry for entry in [*former, *entries]}.values())
        kept = [] if run.overwrite else former
        _write(path, run, [*kept, *entries])
    order = {entry.folder: entry for _, _, entries in asked for entry in entries}
    # Study by study, and within a study at random, always alike: what disturbs a machine for a while then meets all.
    return sorted(order.values(), key=lambda entry: (entry.seed, stable_hash(entry.name)))


def planned(records: Path) -> list[Entry]:
    """Every trial planned below `records`."""
    if not records.is_dir():
        raise UserError(f"{records} is not a folder; give a folder of records")
    return [entry for path in sorted(records.glob("*/*/*/*/plan_*.json")) for entry in _entries(path)]


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
    # records/scale/ruleset/machine/label/plan_*.json
    config = content["config"] | {"records": path.parents[4], "overwrite": False, "debug": False}
    run = Run(**config, overridden=tuple(content["overridden"]))
    run = run.model_copy(update={"label": path.parent.name})
    return [_entry(run, path.parent, seed, trial) for seed, trial in content["trials"]]


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
