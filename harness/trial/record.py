"""The record of a trial while it runs: opened, continued, appended to and closed.

Every file is replaced in one rename, so a reader or a crash sees the old file or the new one. CSV and JSON only, and a
checkpoint that loads with weights_only=True: nothing here executes on loading. What the files hold:
harness/records/layout.py, evaluations.py and manifest.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from harness.config.schema import NOT_RECORDED, Run
from harness.errors import ManifestError, UserError
from harness.files import check_writable, remove_leftovers, write_atomically
from harness.hashing import config_hash
from harness.processes import interrupts_deferred
from harness.records.differences import differences
from harness.records.kills import forget_kills
from harness.records.layout import FILES, RecordPath
from harness.records.lease import Lease
from harness.records.manifest import FORMAT, FORMAT_VERSION, Evidence, FinalFigures, Life, Manifest
from harness.records.packing import unpack_if_packed
from harness.records.status import Status


class Record:
    """One trial's folder. `load` it, which refuses a folder that holds something else; to write, `acquire` and `start`
    it."""

    def __init__(self, run: Run, path: RecordPath) -> None:
        self.run = run
        self.path = path
        self.manifest: Manifest | None = None
        """None until the trial has started."""
        self.rows: list[dict[str, Any]] = []
        """The rows of eval_measurements.csv that this process knows: of the checkpoint, and those appended since."""
        self._lease: Lease | None = None
        # SHA-256 of what this process wrote last, by file.
        self._written: dict[Path, str] = {}
        self._life_began = monotonic()

    @property
    def folder(self) -> Path:
        """The trial's folder."""
        return self.path.folder

    @property
    def status(self) -> Status | None:
        """The status in the manifest; None for a trial that has not started."""
        return self.manifest.status if self.manifest is not None else None

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended, as far as this process is concerned. One whose ranks were lost has not."""
        manifest = self.manifest
        lost_ranks = manifest is not None and manifest.final is not None and manifest.final.lost_ranks
        return manifest is not None and manifest.status.is_finished and not lost_ranks

    @property
    def preemption_count(self) -> int:
        """How often the trial was interrupted and continued."""
        return self.manifest.preemption_count if self.manifest is not None else 0

    @classmethod
    def load(cls, run: Run, path: RecordPath) -> Record:
        """Read the trial's folder and change nothing; raises UserError if it cannot be this trial's."""
        record = cls(run, path)
        try:
            # Before any data are loaded or anything is trained.
            check_writable(path.folder)
        except OSError as error:
            raise UserError(
                f"records={run.records}: {path.folder} cannot be used ({error.strerror}); give another folder with "
                "records="
            ) from error
        record._read_manifest()
        return record

    def acquire(self, lease_token: str | None = None) -> None:
        """Take the folder, so that no other process writes it. lease_token: of its lease if the parent process holds
        it. Raises UserError where another process writes the folder, and where it cannot be written."""
        with self._report_unwritable():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire(lease_token)

    def start(self, values: dict[str, Any]) -> None:
        """Discard or continue the trial in the folder, which must have been acquired, and write the manifest.

        values: keys of `Manifest` without configuration and status. Raises UserError where the trial was begun on other
        data, and where the folder cannot be written.
        """
        with self._report_unwritable():
            # With the lease, and before anything is written: a former holder that was suspended after its last check of
            # the lease cannot put in place any more what it had written.
            self._check_lease()
            remove_leftovers(self.folder, FILES)
            # Decided anew, since _acquire has read the manifest again.
            if self.run.overwrite:
                self.manifest = None
            if self.manifest is None:
                self._check_lease()
                for file in (self.path.evaluations, self.path.checkpoint):
                    file.unlink(missing_ok=True)
            self.manifest = self._next_manifest(values)
            self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest as it is now. Raises LeaseLost and OSError."""
        assert self.manifest is not None
        if self.manifest.evidence is not None and self.manifest.evidence.lives:
            self.manifest.evidence.lives[-1].seconds = monotonic() - self._life_began
        # Every file with a check as late as possible, so that a lease lost in the meantime is noticed.
        self.manifest.write(self.path.manifest, self._check_lease)
        self._note_written(self.path.manifest)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to eval_measurements.csv. Raises LeaseLost and OSError."""
        self.rows.append(row)
        self.write_rows()

    def write_rows(self) -> None:
        """Write all rows; columns are the union over rows in order of appearance, absent values empty. Raises LeaseLost
        and OSError."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path.evaluations, text.getvalue(), self._check_lease)
        self._note_written(self.path.evaluations)

    def write_extra(self, name: str, content: bytes) -> None:
        """Write another file of the record (`harness.records.layout`). Raises LeaseLost and OSError."""
        write_atomically(self.folder / name, content, self._check_lease)

    def changed_files(self) -> list[str]:
        """Names of the files that are not as this process wrote them last."""
        return [path.name for path, digest in self._written.items() if _hash_file(path) != digest]

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write `state` and the rows so far as the checkpoint. Raises LeaseLost and OSError."""
        # Into memory, so that an interrupt does not wait for the disk.
        buffer = io.BytesIO()
        with interrupts_deferred():
            torch.save(state | {"rows": self.rows}, buffer)
        write_atomically(self.path.checkpoint, buffer.getbuffer(), self._check_lease)
        self._note_written(self.path.checkpoint)
        # With the wall time of this life: a process that is killed cannot write it.
        self.write_manifest()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint's state, with all tensors on the CPU; None if there is none. Sets `rows` to the rows of
        the checkpoint. Raises UserError if it is corrupt."""
        if not self.path.checkpoint.exists():
            return None
        try:
            # Checksums, since torch.load reads flipped bits without an error.
            with zipfile.ZipFile(self.path.checkpoint) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"damaged at {damaged}")
            state = torch.load(self.path.checkpoint, map_location="cpu", weights_only=True)
            self.rows = state.pop("rows")
        except Exception as error:
            raise UserError(
                f"{self.path.checkpoint} is corrupt ({error}); add overwrite=true to start the trial again"
            ) from error
        return dict(state)

    def finish(self, status: Status, final: dict[str, Any], tampered: Iterable[str] = ()) -> None:
        """Write how the trial ended. final: as `FinalFigures` has it. tampered: names of files that others changed.
        Raises LeaseLost and OSError."""
        assert self.manifest is not None
        if self.manifest.evidence is not None:
            self.manifest.evidence.tampered = sorted(tampered)
        self.manifest.status, self.manifest.final = status, FinalFigures(**final)
        self.write_manifest()
        # The caller writes nothing more, and another process may.
        self._written.clear()
        # After the manifest: a process killed in between must find the checkpoint to resume from. A crashed trial is
        # retried from its last checkpoint.
        if status.is_finished and not status.is_crash:
            self.path.checkpoint.unlink(missing_ok=True)
            forget_kills(self.path)

    def close(self) -> None:
        """Release the folder."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    # ---- how it is done --------------------------------------------------------------------------------------------

    @contextmanager
    def _report_unwritable(self) -> Iterator[None]:
        """Raise UserError for an OSError of the body."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"records={self.run.records}: {self.folder} cannot be written ({error.strerror}); "
                "give another folder with records="
            ) from error

    def _read_manifest(self) -> None:
        """Read the manifest; raises UserError unless it is this trial's, or is to be overwritten."""
        self.manifest = None
        try:
            manifest = Manifest.read(self.path.manifest)
        except ManifestError as error:
            if self.run.overwrite:
                return
            raise UserError(
                f"{self.path.manifest} cannot be read ({error}); add overwrite=true to replace the record, "
                "or label=NAME to write another"
            ) from error
        if manifest is not None and not self.run.overwrite:
            # Through JSON, where tuples become lists, as in the manifest.
            differing = differences(manifest.identity, json.loads(json.dumps(self.run.identity())))
            if differing:
                raise UserError(
                    f"{self.folder} holds a record of another configuration ({'; '.join(differing)}); "
                    "give label=NAME for a folder of its own, or overwrite=true to replace it"
                )
        self.manifest = manifest

    def _acquire(self, lease_token: str | None) -> None:
        lease = Lease.acquire(self.folder, executor=self.run.executor.name, token=lease_token)
        if lease is None:
            raise UserError(
                f"{self.folder} is being written by another process; wait for it, or give this run label=NAME"
            )
        self._lease = lease.start_heartbeat()
        # It can have been packed since `load`. With the lease, since a folder in which a trial runs is not packed.
        unpack_if_packed(self.path.submission_folder)
        status_before = self.status
        # Read again, now that nobody else writes.
        self._read_manifest()
        # `load` saw it unfinished: the caller has decided to run it, and would repeat a finished trial.
        if self.status is not None and self.status is not status_before and self.status.is_finished:
            raise UserError(f"{self.folder} was finished by another process this moment; run the command again")

    def _next_manifest(self, values: dict[str, Any]) -> Manifest:
        """The manifest of a trial that starts now, or goes on from the one that is there."""
        former = self.manifest
        counts: dict[str, Any] = {"preemption_count": 0}
        lives = former.evidence.lives if former is not None and former.evidence is not None else []
        evidence = Evidence(judge=self.run.judge, lives=[*lives, Life(first_row=len(self.rows), seconds=0.0)])
        if former is not None:
            self._check_data(former, values)
            self._check_version(former, values)
            counts = former.model_dump(include={"preemption_count", "failures"}, exclude_unset=True)
            if former.status.is_crash:
                traceback = former.final.traceback if former.final is not None else None
                counts["failures"] = [*former.failures, traceback]
            # An interruption before the first row or checkpoint is not counted: nothing that was recorded is lost.
            elif self.path.checkpoint.exists() or self.path.evaluations.exists():
                counts["preemption_count"] = former.preemption_count + 1
        return Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            status=Status.RUNNING,
            modified=list(self.run.modified),
            config_hash=config_hash(self.run.identity()),
            identity=self.run.identity(),
            config=self.run.model_dump(mode="json", exclude=NOT_RECORDED),
            evidence=evidence,
            **counts,
            **values,
        )

    def _check_data(self, former: Manifest, values: dict[str, Any]) -> None:
        """Raise UserError if the trial was begun on other data; where they came from does not matter."""
        before, now = (
            {key: value for key, value in data.items() if key != "source"}
            for data in (former.data, values.get("data", {}))
        )
        if before and now and (differing := differences(before, now)):
            raise UserError(
                f"{self.folder} holds a trial on other data ({'; '.join(differing)}); give data= the folder it was "
                "begun with, label=NAME for a record of its own, or overwrite=true to replace it"
            )

    def _check_version(self, former: Manifest, values: dict[str, Any]) -> None:
        """Raise UserError if another version of Pacemark began the trial: its parts would be of two programs."""
        before, now = (code.get("version") for code in (former.code, values.get("code", {})))
        if before and now and before != now:
            raise UserError(
                f"{self.folder} was begun by Pacemark {before}, and this is {now}; continue it with that "
                "version, or add overwrite=true to start it again"
            )

    def _note_written(self, path: Path) -> None:
        self._written[path] = _hash_file(path) or ""

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


def _hash_file(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


class ReadOnlyRecord(Record):
    """The record of the ranks other than 0: they read what is there, and write nothing."""

    def acquire(self, lease_token: str | None = None) -> None:
        """Does nothing."""

    def start(self, values: dict[str, Any]) -> None:
        """As `Record.start`, in memory alone."""
        if self.run.overwrite:
            self.manifest = None
        self.manifest = self._next_manifest(values)

    def write_manifest(self) -> None:
        """Does nothing."""

    def write_rows(self) -> None:
        """Does nothing."""

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Does nothing."""

    def write_extra(self, name: str, content: bytes) -> None:
        """Does nothing."""

    def finish(self, status: Status, final: dict[str, Any], tampered: Iterable[str] = ()) -> None:
        """As `Record.finish`, in memory alone."""
        assert self.manifest is not None
        self.manifest.status, self.manifest.final = status, FinalFigures(**final)
