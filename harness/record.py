"""The record of a trial: AlgoPerf's folder layout, one CSV of evaluations, one JSON manifest, and a checkpoint.

    <records>/<scale>/<ruleset>/<machine>/<label>/study_<seed>/<workload>[_<variant>]_pytorch/trial_<n>/
        .lease.<n>              while a process is at it (harness/lease.py)
        eval_measurements.csv   one row per evaluation, whole rows at any moment
        manifest.json           status, configuration and its hash, data, versions, machine, seeds, final figures
        checkpoint.pt           while the trial is not finished

Every file is replaced in one rename, so a reader or a crash sees the old file or the new one. CSV and JSON only, and a
checkpoint that loads with weights_only=True: nothing here executes on loading.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.config import Run, config_hash
from harness.lease import Lease
from harness.problems import UserError

FORMAT = "pacemark-record"
FORMAT_VERSION = 1


class Status(StrEnum):
    RUNNING = "running"
    REACHED = "reached"
    """The target was met."""
    EXHAUSTED = "exhausted"
    """The budget was used up first."""
    DIVERGED = "diverged"
    """The loss or the metric became non-finite."""
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    """An exception; its traceback is in the manifest."""
    PRUNED = "pruned"
    """By the rule that `pruning=` names, before its budget was used up: nobody knows how it would have ended."""
    STOPPED = "stopped"
    """By a signal; the same command continues it."""

    @property
    def finished(self) -> bool:
        return self not in (Status.RUNNING, Status.STOPPED)

    @property
    def crashed(self) -> bool:
        return self in (Status.FAILED, Status.OUT_OF_MEMORY)


def folder_of(run: Run, machine: str) -> Path:
    """Where the trial's record lies. machine: name of the machine's folder if the run gives none."""
    workload = f"study_{run.seed}/{run.facts.full_name}_pytorch/trial_{run.trial}"
    return submission_folder(run, machine) / workload


def submission_folder(run: Run, machine: str) -> Path:
    machine = machine if run.machine == "auto" else run.machine
    return run.records / run.scale_folder / run.ruleset.name / machine / run.submission_label


NOT_RECORDED = {"modified", "shipped", "overridden", "overwrite", "debug", "records", "data"}
"""What says nothing about the trial; where files lie on somebody's machine is nobody else's business."""


class Record:
    """One trial's folder. Open it with `Record.open`, which refuses folders that hold something else."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.run = run
        self.manifest: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self._lease: Lease | None = None

    @property
    def csv_path(self) -> Path:
        return self.folder / "eval_measurements.csv"

    @property
    def manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def status(self) -> Status | None:
        return Status(self.manifest["status"]) if self.manifest else None

    @property
    def over(self) -> bool:
        """Whether the trial has ended, for all that this process may do. One whose ranks were lost has not."""
        return self.status is not None and self.status.finished and not self.manifest.get("final", {}).get("lost_ranks")

    @classmethod
    def inspect(cls, run: Run, machine: str) -> Record:
        """Read what the trial's folder holds, changing nothing; UserError if it cannot be this trial's."""
        folder = folder_of(run, machine)
        record = cls(folder, run)
        try:
            _check_writable(folder)
            record._read()
        except OSError as error:
            raise UserError(
                f"records={run.records}: {folder} cannot be used ({error.strerror}); give another folder with records="
            ) from error
        return record

    def _read(self) -> None:
        if not self.manifest_path.exists():
            return
        try:
            self.manifest = json.loads(self.manifest_path.read_text())
            known = self.manifest["format"] == FORMAT and self.manifest["format_version"] == FORMAT_VERSION
            identity, _ = self.manifest["identity"], Status(self.manifest["status"])
        except (ValueError, KeyError, TypeError) as error:
            self.manifest = {}
            if self.run.overwrite:
                return
            raise UserError(
                f"{self.manifest_path} cannot be read ({error}); add overwrite=true to replace the record, "
                "or label=NAME to write another"
            ) from error
        if self.run.overwrite:
            return
        if not known:
            raise UserError(f"{self.manifest_path} is of another format or version; use label=NAME or overwrite=true")
        differing = differences(identity, json.loads(json.dumps(self.run.identity())))
        if differing:
            raise UserError(
                f"{self.folder} holds a record of another configuration ({'; '.join(differing)}); "
                "give label=NAME for a folder of its own, or overwrite=true to replace it"
            )

    def begin(self, facts: dict[str, Any], lease_token: str | None = None) -> None:
        """Create or replace the folder (or continue it) and write the manifest with `facts`.

        lease_token: of the folder's lease if the parent process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lease = Lease.take(self.folder, executor=self.run.executor.name, token=lease_token)
            if lease is None:
                raise UserError(
                    f"{self.folder} is being written by another process; wait for it, or give this run label=NAME"
                )
            self._lease = lease.keep()
            before = self.status
            self._read()  # again, now that nobody else writes
            if self.status is not before and self.status is not None and self.status.finished:
                raise UserError(f"{self.folder} was finished by another process this moment; run the command again")
            for leftover in self.folder.glob(".*.[0-9]*"):  # of a process killed while it wrote
                if leftover.name.startswith((".eval_", ".manifest", ".checkpoint")):
                    leftover.unlink(missing_ok=True)
            continued = bool(self.manifest) and not self.run.overwrite
            if not continued:
                for path in (self.csv_path, self.checkpoint_path):
                    path.unlink(missing_ok=True)
                self.manifest = {"preemption_count": 0}
            if continued:
                self._check_data(facts)
            if continued and self.status is not None and self.status.crashed:
                self.manifest.setdefault("failures", []).append(self.manifest.pop("final", {}).get("traceback"))
            elif continued and (self.checkpoint_path.exists() or self.csv_path.exists()):
                self.manifest["preemption_count"] += 1
            self.manifest |= {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "status": str(Status.RUNNING),
                "modified": list(self.run.modified),
                "config_hash": config_hash(self.run.identity()),
                "identity": self.run.identity(),
                "config": self.run.model_dump(mode="json", exclude=NOT_RECORDED),
            } | facts  # fmt: skip
            self.write_manifest()
        except OSError as error:
            raise UserError(
                f"records={self.run.records}: {self.folder} cannot be written ({error.strerror}); "
                "give another folder with records="
            ) from error

    def _check_data(self, facts: dict[str, Any]) -> None:
        """UserError if the trial was begun on other data; where they came from does not matter."""
        there, now = (
            {k: v for k, v in side.get("data", {}).items() if k != "source"} for side in (self.manifest, facts)
        )
        if there and now and (differing := differences(there, now)):
            raise UserError(
                f"{self.folder} holds a trial on other data ({'; '.join(differing)}); give data= the folder it was "
                "begun with, label=NAME for a record of its own, or overwrite=true to replace it"
            )

    def write_manifest(self) -> None:
        self._check_lease()
        replace(self.manifest_path, (json.dumps(_jsonable(self.manifest), indent=2) + "\n").encode())

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write_rows()

    def write_rows(self) -> None:
        """The whole CSV; columns are the union over rows in order of appearance, absent values empty."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self._check_lease()
        replace(self.csv_path, text.getvalue().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(state | {"rows": self.rows}, buffer)
        self._check_lease()
        replace(self.checkpoint_path, buffer.getbuffer())

    def load_checkpoint(self, device: Any) -> dict[str, Any] | None:
        """The last checkpoint's state, with `rows` put back; None if there is none. UserError if it is corrupt."""
        import torch

        if not self.checkpoint_path.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint_path) as archive:
                damaged = archive.testzip()  # checksums: torch.load reads flipped bits without a word
            if damaged:
                raise ValueError(f"damaged at {damaged}")
            state = torch.load(self.checkpoint_path, map_location=device, weights_only=True)
            self.rows = state.pop("rows")
        except Exception as error:
            raise UserError(
                f"{self.checkpoint_path} is corrupt ({error}); add overwrite=true to start the trial again"
            ) from error
        return dict(state)

    def finish(self, status: Status, final: dict[str, Any]) -> None:
        self.manifest |= {"status": str(status), "final": final}
        self.write_manifest()
        if status.finished and not status.crashed:  # a crashed trial can be tried again from its last checkpoint
            self.checkpoint_path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


class Follower(Record):
    """The record as the ranks other than 0 see it: they read what is there and write nothing."""

    def begin(self, facts: dict[str, Any], lease_token: str | None = None) -> None:
        self.manifest = {"preemption_count": 0} | facts

    def write_manifest(self) -> None:
        pass

    def write_rows(self) -> None:
        pass

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        pass

    def finish(self, status: Status, final: dict[str, Any]) -> None:
        self.manifest |= {"status": str(status), "final": final}


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write `path` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _check_writable(folder: Path) -> None:
    """Raise the OSError that writing would meet, without leaving anything."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(20, f"{existing} is not a folder")
    probe = existing / f".pacemark-probe-{os.getpid()}"
    try:
        probe.write_bytes(b"\0" * 4096)
    finally:
        probe.unlink(missing_ok=True)


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == after else [f"{prefix}: {before} there, {after} now"]


def _jsonable(value: Any) -> Any:
    """Strict JSON has no NaN; a missing figure is null, a non-finite one its name."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
