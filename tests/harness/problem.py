"""A small workload of the tests: a network with BatchNorm and dropout on random vectors, all in closed view."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from harness.interface.data_order import Selection
from harness.interface.needs import Need
from harness.interface.step import ModelRunner, StepContext
from harness.interface.workload import Batch, Split, Workload, WorkloadSpec
from harness.seeding import TrialSeeds


class Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Net(nn.Module):
    def __init__(self, dropout: float = 0.5, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))


class Vectors(Workload):
    Model = Nothing
    Data = Nothing

    def load(self, source: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(64, 5, generator=generator)
        self._y = torch.randint(3, (64,), generator=generator)

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}

    @property
    def train_size(self) -> int:
        return 64

    def build_model(self) -> nn.Module:
        return Net()

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        return {"inputs": self._x[indices], "labels": self._y[indices]}

    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction=reduction)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(outputs.softmax(-1), 1, generator=generator).squeeze(1)

    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        yield from [{"inputs": self._x, "labels": self._y}][part]

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(outputs, batch["labels"], reduction="sum")
        return {"loss": loss, "num_examples": torch.tensor(len(batch["labels"]))}


FACTS = dict(
    name="vectors", description="", class_path="", version=1, metric="loss", direction="min", target=0.1,
    target_version=1, nominal_batch=16, micro_batch=16, max_steps=10, eval_every=2, max_seconds=60.0, model={}, data={},
)  # fmt: skip


def make(
    *needs: Need, micro_batch: int = 16, model: nn.Module | None = None, examples: int = 16
) -> tuple[ModelRunner, StepContext]:
    """An evaluator and the context of its first step."""
    workload = Vectors(WorkloadSpec(**FACTS | {"micro_batch": micro_batch}))
    workload.load("", torch.device("cpu"))
    torch.manual_seed(1)
    model = (model or Net()).double()
    workload._x = workload._x.double()
    evaluator = ModelRunner(workload, model, TrialSeeds(0, 1), nullcontext)
    return evaluator, context(evaluator, *needs, examples=examples)


def context(evaluator: ModelRunner, *needs: Need, examples: int = 16) -> StepContext:
    batch = evaluator.load_batch(Selection(torch.arange(examples), torch.arange(examples)))
    return StepContext(evaluator, batch, 0, frozenset(needs), "test")
