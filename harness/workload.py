"""The interface of a workload: what the harness may ask of a fixed problem.

A workload owns the model, the data, the loss and the metric. The harness owns the order of the data, reduction over
micro-batches, devices, precision and time. Everything that decides a result (sizes, target, budget, evaluation grid)
is in the facts, which come from the config; a workload's class has no hidden numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""What one forward needs, first dimension = examples. The key ``labels`` holds what the loss compares with."""

Split = Literal["validation", "test"]


class WorkloadError(Exception):
    """Data or facts of a workload are missing or wrong; the message says what to do."""


class Facts(BaseModel):
    """The facts of a workload at one scale: they fix the problem, and nobody tunes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name in commands, records and tables; no underscore, which separates the variant in folder names."""
    variant: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name of the variant: this workload with one thing changed. None: the workload itself."""
    held_out: bool = True
    """Of a variant: whether the workload counts only for submissions that reach the variant's target too. False: the
    variant is a workload of its own, with points of its own."""
    description: str
    """One line for --help."""
    class_path: str
    """Import path of the Workload subclass."""
    version: int = Field(ge=1)
    """Raised whenever anything that can move a result changes; no table mixes versions."""
    metric: str
    """Key of the target metric in what evaluation returns."""
    direction: Literal["min", "max"]
    """Whether the metric is better smaller or larger."""
    target: float
    """Value of the validation metric to reach."""
    target_version: int = Field(ge=1)
    target_provenance: Any = None
    """How the target was measured: command, seeds, winner. Documentation; changes no result."""
    nominal_batch: int = Field(ge=1)
    """Examples per nominal step."""
    micro_batch: int = Field(ge=1)
    """Examples of one forward; BatchNorm statistics and dropout keys are per micro-batch."""
    max_steps: int = Field(ge=1)
    """Budget in nominal steps."""
    eval_every: int = Field(ge=1)
    """Evaluation grid: every so many nominal steps, and at the end of the budget."""
    max_seconds: float = Field(gt=0)
    """Safety net on the training clock, far above any sensible trial."""
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    model: dict[str, Any]
    """Options of the model, checked by the workload's own ``Model`` schema."""
    data: dict[str, Any]
    """Options of the data, checked by the workload's own ``Data`` schema."""

    @model_validator(mode="after")
    def _consistent(self) -> Facts:
        if self.micro_batch > self.nominal_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} is larger than nominal_batch={self.nominal_batch}; lower it"
            )
        if self.nominal_batch % self.micro_batch:
            raise ValueError(
                f"nominal_batch={self.nominal_batch} is not a multiple of micro_batch={self.micro_batch}; "
                "the nominal batch is made of whole micro-batches"
            )
        return self

    @property
    def full_name(self) -> str:
        """Name with the variant, as in records and tables: `gpt2`, or `gpt2_silu`."""
        return self.name if self.variant is None else f"{self.name}_{self.variant}"

    def meets_target(self, value: float) -> bool:
        return value <= self.target if self.direction == "min" else value >= self.target

    def distance(self, value: float) -> float:
        """How far `value` is from the target; positive while it is not met."""
        return value - self.target if self.direction == "min" else self.target - value


class Workload(ABC):
    """One fixed problem. Subclasses name the schemas of ``facts.model`` and ``facts.data``."""

    Model: ClassVar[type[BaseModel]]
    Data: ClassVar[type[BaseModel]]

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.model_options: Any = self.Model(**facts.model)
        self.data_options: Any = self.Data(**facts.data)

    @abstractmethod
    def load(self, source: str, device: torch.device) -> None:
        """Load the data onto `device`, check the content hash. `source`: auto, a named source, or a folder.

        Raises WorkloadError naming every way to get the data when it is missing, or the hashes when they differ.
        """

    @classmethod
    def lacks(cls, data: dict[str, Any], source: str) -> str:
        """What the data that `load` would read from `source` lack of the published ones, in words; empty if nothing.

        A trial on incomplete data is marked as modified, and no table takes it. data: ``facts.data``.
        """
        return ""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Content hashes (SHA-256) of the loaded data and the source it came from, for the record."""

    @property
    @abstractmethod
    def train_size(self) -> int:
        """Number of training examples."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model on the CPU, initialised from torch's global generator (which the harness has seeded)."""

    def role_patterns(self) -> dict[str, str]:
        """Parameter-name pattern (fnmatch) -> role, where the module type alone does not tell (see harness.roles)."""
        return {}

    @abstractmethod
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Training examples on the data's device, augmented.

        indices: int64 [n] on the CPU, in [0, train_size). keys: int64 [n] on the CPU, each in [0, 2**63), 63 random
        bits that decide the example's augmentation: a pure function of (seed, position in the example stream).
        """

    @property
    def lookahead(self) -> int:
        """How many batches ahead of the one that is asked for `prefetch` is called; 0 where reading takes no time."""
        return 0

    def prefetch(self, indices: Tensor, keys: Tensor) -> None:  # noqa: B027
        """A hint that `batch(indices, keys)` will probably come soon. Returns at once, and changes no result."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs of the model, for example logits [n, classes]."""
        return model(batch["inputs"])

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Training loss: a scalar mean over the examples, or one value per example [n]."""

    @abstractmethod
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the model's own predictive distribution, shaped like ``batch["labels"]``."""

    @abstractmethod
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        """The whole split in a fixed order, on the data's device; or of its batches those that `part` picks by their
        number, for ranks that share an evaluation."""

    @abstractmethod
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Per metric, the sum over the batch's examples; and ``num_examples``, what the sums are divided by.

        Sums, so that batches (and later ranks) can be added in a fixed order.
        """
