"""The manifest of a trial: all that its record holds besides the evaluations. Written and read here alone.

manifest.json is strict JSON. Nothing in it is executed on loading. `Manifest` documents the format; version 1 is the
only one so far. Keys that it does not know are kept, so that a later version's records survive an earlier one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from harness.errors import ManifestError
from harness.files import write_atomically
from harness.records.layout import machine_folder_name
from harness.records.status import UNUSABLE, Status

FORMAT: Final = "pacemark-record"
FORMAT_VERSION: Final = 1

M = TypeVar("M", bound=BaseModel)


class FinalFigures(BaseModel):
    """What came of a trial. A trial that ended before its first evaluation has only the first three.

    Besides these there are, with the target's metric in their names: `final_validation/<metric>`,
    `best_validation/<metric>`, and `test/<metric>_at_target`; see `of_metric`.
    """

    model_config = ConfigDict(extra="allow")

    stop_reason: str | None = None
    traceback: str | None = None
    """Of the exception that a failed trial ended with."""
    lost_ranks: list[int] = Field(default_factory=list)
    """Processes that were lost; such a trial can be continued."""
    time_to_target: float | None = None
    """Seconds on the training clock at the first evaluation that met the target; None if none did."""
    steps_to_target: int | float | None = None
    """Nominal steps there."""
    resolution_seconds: float | None = None
    """Seconds since the evaluation before: how exactly the time to target is known."""
    resolution_steps: int | float | None = None
    forward_examples_to_target: int | None = None
    backward_examples_to_target: int | None = None
    energy_joules_to_target: float | None = None
    """None where no meter could be read."""
    global_step: int | float | None = None
    """Nominal steps at the end."""
    submission_seconds: float | None = None
    """Seconds on the training clock at the end."""
    peak_memory_bytes: int | None = None
    parameters: int | None = None
    """Trainable parameters of the model."""
    optimizer_state_bytes: int | None = None
    optimizer_state_bytes_per_parameter: float | None = None
    data_wait_share: float | None = None
    """Share of the training clock that was spent waiting for data."""
    evaluation_share: float | None = None
    """Share of the wall time that was spent on evaluations."""
    cpu_seconds_per_second: float | None = None
    slow_segment_ratio: float | None = None
    disturbed: bool | None = None
    """Whether the machine was visibly busy with something else."""
    weights_sha256: str | None = None
    submission_summary: dict[str, Any] | None = None
    """What the submission has to say of its training, such as whether it switched from one method to another."""

    def of_metric(self, key: str) -> float | None:
        """A figure that has the metric in its name, such as `best_validation/loss`; None if there is none."""
        value = (self.model_extra or {}).get(key)
        # JSON has whole numbers that are too large for a float.
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return None
        return float(value) if isinstance(value, int | float) else None


class Life(BaseModel):
    """One life of a trial's process: from its start to its end, or to the kill that ended it."""

    model_config = ConfigDict(extra="allow")

    first_row: int
    """How many rows there were when it began."""
    seconds: float = 0.0
    """Wall time to its last row."""


class KeptWeights(BaseModel):
    """A file of weights that an evaluation was made with, for judge=replay."""

    model_config = ConfigDict(extra="allow")

    row: int
    """Index of the evaluation."""
    sha256: str
    """Of the weights, as `harness.trial.weights.hash_weights` has it."""


class Evidence(BaseModel):
    """What was seen of the submission while the trial ran, for whoever reviews the record (docs/fair_play.md).

    The columns of the evaluations that are evidence too are `EVIDENCE_COLUMNS` of harness/records/evaluations.py.
    """

    model_config = ConfigDict(extra="allow")

    judge: Literal["process", "replay", "none"]
    """Who evaluated: a process out of the submission's reach; the submission's own, with the weights kept so that they
    can be evaluated again; or its own alone."""
    sources: dict[str, str] = {}
    """SHA-256 of every source file that the submission brings and that is of no library and not of the harness, by
    path."""
    distributions: dict[str, str] = {}
    """Versions of the installed distributions that the submission's classes come from."""
    initial_weights_sha256: str | None = None
    """Of the model before the submission saw it: a function of seed, workload and version of torch."""
    built_weights_sha256: str | None = None
    """Of the model after the submission was built on it."""
    model_sha256: str | None = None
    """Of the structure of the workload's model: modules, shapes, hooks."""
    model_changes: list[str] = []
    """How the submission's model differed from it at an evaluation."""
    patched: list[str] = []
    """Callables of torch, Python or the harness that were replaced in its process."""
    judge_imported: bool = False
    """Whether the judge's own process had imported the submission, which can change what it imports."""
    lives: list[Life] = []
    import_cpu_seconds: float | None = None
    """CPU time that importing the submission took, with judge=process."""
    threads: int | None = None
    """Most threads that torch was set to at an evaluation."""
    files_opened: list[str] = []
    """Files that were opened after the submission was imported, except those of libraries and of the system."""
    connections: list[str] = []
    """Addresses that the process connected to."""
    programs: list[str] = []
    """Programs and processes that it started."""
    tampered: list[str] = []
    """Files of the record that another process than the judge changed."""
    kept_weights: dict[str, KeptWeights] = {}
    """By the name of the file."""


def _text_or_none(value: Any) -> str | None:
    # A record with a damaged `variant_of` is read as one of a workload, not refused.
    return value if isinstance(value, str) else None


def _refuse_unusable(status: Status) -> Status:
    if status in UNUSABLE:
        raise ValueError(f"{status} is no status of a manifest")
    return status


class Manifest(BaseModel):
    """The contents of manifest.json."""

    model_config = ConfigDict(extra="allow")

    format: Literal["pacemark-record"]
    format_version: Literal[1]
    status: Status
    preemption_count: int = Field(default=0, ge=0, le=10**9)
    """How often the trial was interrupted and continued."""
    failures: list[str | None] = []
    """Tracebacks of former tries of a trial that crashed and was tried again."""
    modified: list[str] = []
    """Keys of the workload that differ from the shipped one; no table takes such a trial."""
    config_hash: str
    """SHA-256 of `identity`."""
    identity: dict[str, Any]
    """Everything that can move the result."""
    config: dict[str, Any]
    """The whole configuration, as `harness.config.schema.Run` has it."""
    submission: str
    """The submission's label."""
    workload: str
    """With the variant: gpt2, or gpt2_silu."""
    variant_of: Annotated[str | None, BeforeValidator(_text_or_none)] = None
    """Of a held-out variant: its base workload."""
    workload_version: int
    target_version: int
    metric: str
    """The target's column, for example `validation/loss`."""
    direction: Literal["min", "max"]
    target: float
    hyperparameters: dict[str, Any]
    """As the algorithm was built with them."""
    needs: list[str] = []
    arranged: dict[str, Any] = {}
    """What the harness arranged for the needs: compilation of the model, kind of attention."""
    remarks: list[str] = []
    """What a reader should know of the submission, such as rates that do not follow the schedule."""
    seeds: dict[str, int] = {}
    """study, trial, and base: the hash of the two that all randomness comes from."""
    data: dict[str, str] = {}
    """Content hashes of the data and where they came from."""
    code: dict[str, Any] = {}
    """Version of Pacemark; in a checkout also its git commit and whether its files differed from it."""
    packages: dict[str, str] = {}
    machine: dict[str, Any] = {}
    evidence: Evidence | None = None
    """What was seen of the submission; None in records of before there was any."""
    final: FinalFigures | None = None
    """What came of the trial; None while it runs."""

    _check_status = field_validator("status")(_refuse_unusable)

    @property
    def metric_name(self) -> str:
        """The metric without its split: `loss`."""
        return self.metric.removeprefix("validation/")

    # The values below `identity`, `config` and `machine` are not validated, and a record can come from anyone: what the
    # properties read there can be of any type.

    @property
    def scale(self) -> str:
        """The name of the trial's scale, an empty string if the identity has none."""
        return _name(self.identity.get("scale"))

    @property
    def ruleset(self) -> str:
        """The name of the trial's ruleset, an empty string if the identity has none."""
        return _name(self.identity.get("ruleset"))

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The submission's configuration, empty if there is none."""
        optimizer = self.config.get("optimizer")
        return optimizer if isinstance(optimizer, dict) else {}

    @property
    def max_steps(self) -> int | None:
        """The budget in nominal steps; None if the identity has none."""
        workload = self.identity.get("workload")
        steps = workload.get("max_steps") if isinstance(workload, dict) else None
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def machine_folder(self) -> str | None:
        """The name of the machine's folder that its description gives; None if it lacks what that takes."""
        try:
            return machine_folder_name(self.machine)
        except (KeyError, TypeError):
            return None

    @classmethod
    def parse(cls, content: bytes | str) -> Manifest:
        """From the text of a manifest.json; raises ManifestError naming the first key that is wrong."""
        return _parse(cls, content)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """From a file; None if there is none. Raises ManifestError if it cannot be read."""
        return _read(cls, path)

    def write(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Write manifest.json whole or not at all, with the keys that were set. check: called immediately before it is
        put in place; where it raises, it is not. Raises OSError."""
        # Without the defaults, so that a manifest which is read and written again gains no keys.
        content = self.model_dump(exclude_unset=True)
        write_atomically(path, json.dumps(_strict(content), indent=2) + "\n", check)


class ManifestSummary(BaseModel):
    """What a list of trials shows of a manifest. The rest of the file is not decoded, which makes reading it several
    times as fast and keeps a hundred thousand of them in little memory. The fields are those of `Manifest`."""

    model_config = ConfigDict(extra="ignore")

    format: Literal["pacemark-record"]
    format_version: Literal[1]
    status: Status
    failures: list[str | None] = Field(default_factory=list)
    metric: str
    target: float
    final: FinalFigures | None = None

    _check_status = field_validator("status")(_refuse_unusable)

    @classmethod
    def parse(cls, content: bytes | str) -> ManifestSummary:
        """As `Manifest.parse`."""
        return _parse(cls, content)

    @classmethod
    def read(cls, path: Path | str) -> ManifestSummary | None:
        """As `Manifest.read`."""
        return _read(cls, path)


def _name(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else ""


def _parse(model: type[M], content: bytes | str) -> M:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise ManifestError(_describe(error)) from error


def _read(model: type[M], path: Path | str) -> M | None:
    try:
        # Not path.read_bytes(), whose buffered file takes longer than the reading itself.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(str(error.strerror)) from error
    return _parse(model, content)


def _describe(error: ValidationError) -> str:
    # The first problem alone: a file of another kind would have one for every key.
    detail = error.errors()[0]
    key = ".".join(str(part) for part in detail["loc"])
    text = detail["msg"].replace("Input should", "must")
    return f"{key}: {text}" if key else text


def _strict(value: Any) -> Any:
    """`value` for strict JSON, which has no NaN and no infinity: a non-finite number becomes its name."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
