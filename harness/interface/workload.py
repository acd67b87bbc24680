"""The interface of a workload: what the harness may ask of a fixed problem.

A workload owns the model, the data, the loss and the metric. The harness owns the order of the data, reduction over
micro-batches, devices, precision and time. Everything that decides a result (sizes, target, budget, evaluation grid)
is in the `WorkloadSpec`, which comes from the config; a workload's class has no hidden numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from harness import renamed

Batch = dict[str, Tensor]
"""Inputs of one forward by name, first dimension = examples. The key ``labels`` holds the targets of the loss."""

Split = Literal["validation", "test"]


class WorkloadSpec(BaseModel):
    """The specification of a workload at one scale: it fixes the problem, and nobody tunes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name in commands, records and tables; no underscore, which separates the variant in folder names."""
    variant: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name of the variant: this workload with one thing changed. None: the workload itself."""
    held_out: bool = True
    """Whether the base workload counts only for submissions that also reach this variant's target. If False, the
    variant is scored as a separate workload."""
    description: str
    """One line for --help."""
    class_path: str
    """Import path of the Workload subclass."""
    version: int = Field(ge=1)
    """Raised whenever anything that can move a result changes; no table mixes versions."""
    metric: str
    """Key of the target metric in the results of an evaluation."""
    direction: Literal["min", "max"]
    """Whether the metric is better smaller or larger."""
    target: float
    """Value of the validation metric to reach."""
    target_version: int = Field(ge=1)
    """Raised whenever `target` changes."""
    target_provenance: Any = None
    """How the target was measured: command, seeds, winner. Documentation only; changes no result."""
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
    """Memory format of the model's parameters."""
    model: dict[str, Any]
    """Options of the model, checked by the workload's own ``Model`` schema."""
    data: dict[str, Any]
    """Options of the data, checked by the workload's own ``Data`` schema."""

    @model_validator(mode="after")
    def _check_batches(self) -> WorkloadSpec:
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
        """Whether a value of the metric is as good as the target."""
        return value <= self.target if self.direction == "min" else value >= self.target

    def distance(self, value: float) -> float:
        """How far `value` is from the target, in units of the metric; positive while it is not met."""
        return value - self.target if self.direction == "min" else self.target - value


class Workload(ABC):
    """One fixed problem. A subclass names the schemas of ``spec.model`` and ``spec.data``."""

    Model: ClassVar[type[BaseModel]]
    """Schema of ``spec.model``; an instance is in `model_options`."""
    Data: ClassVar[type[BaseModel]]
    """Schema of ``spec.data``; an instance is in `data_options`."""
    loss_type: ClassVar[Literal["softmax_cross_entropy"] | None] = None
    """What the loss is, of outputs [..., classes], for submissions that ask for it or smooth labels; None: another."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A method under a former name would be ignored without an error.
        renamed.refuse_overrides(cls, {"lacks": "missing_data"})

    def __init__(self, spec: WorkloadSpec) -> None:
        self.spec = spec
        # Here and not in the spec: only the subclass knows the schemas.
        self.model_options: Any = self.Model(**spec.model)
        self.data_options: Any = self.Data(**spec.data)

    @property
    def facts(self) -> NoReturn:
        """The former name of `spec`; raises AttributeError with the new one."""
        raise AttributeError("Workload.facts is now Workload.spec")

    @abstractmethod
    def load(self, source: str, device: torch.device) -> None:
        """Load the data onto `device` and check their content hash. source: auto, a named source, or a folder.

        Raises WorkloadError, naming every way to get the data where they are missing, or the hashes where they differ.
        """

    @classmethod
    def missing_data(cls, data: dict[str, Any], source: str) -> str:
        """What is missing from the data that `load` would read from `source`, compared with the published data set; an
        empty string if nothing.

        A trial on incomplete data is marked as modified, and no table takes it. data: ``spec.data``.
        """
        return ""

    def discard_held_back(self) -> None:  # noqa: B027
        """Forget the data that are held back: called after `load` in the process of a submission that a judge stands
        beside, before the submission is imported. To be overridden; by default they stay."""

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Content hashes (SHA-256) of the loaded data and the source they came from, for the record."""

    @property
    @abstractmethod
    def train_size(self) -> int:
        """Number of training examples; known after `load`."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model on the CPU, initialised from torch's global generator (which the harness has seeded)."""

    def role_patterns(self) -> dict[str, str]:
        """Role by parameter-name pattern (fnmatch), where the type of the module alone does not tell it (see
        `harness.interface.roles`)."""
        return {}

    @abstractmethod
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Training examples on the data's device, augmented.

        indices: int64 [n] on the CPU, in [0, train_size). keys: int64 [n] on the CPU, in [0, 2**63): 63 random bits
        that decide the example's augmentation, a pure function of (seed, position in the example stream).
        """

    @property
    def lookahead(self) -> int:
        """How many batches ahead of the current one `prefetch` is called; 0 where reading takes no time."""
        return 0

    def prefetch(self, indices: Tensor, keys: Tensor) -> None:  # noqa: B027
        """Announce that `batch(indices, keys)` will probably be called soon. Returns at once and changes no result."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs of the model, for example logits [n, classes]. model: as built, or compiled."""
        return model(batch["inputs"])

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Training loss: a scalar mean over the examples, or one value per example [n]."""

    @abstractmethod
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the model's own predictive distribution, shaped like ``batch["labels"]``."""

    @abstractmethod
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        """The batches of a split in a fixed order, on the data's device. part: which of them, by number, for ranks that
        share an evaluation."""

    @abstractmethod
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """For each metric the sum over the batch's examples, a scalar; and ``num_examples``, the divisor of the sums.

        Sums, so that batches and ranks can be added in a fixed order.
        """
