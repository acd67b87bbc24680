"""The small workload on which the conformance checks train.

Its model has kinds of parameters that update rules often forget: a scalar, an empty and a non-contiguous parameter, one
without gradient, a frozen one, a convolution, an embedding, BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from typing_extensions import override

from harness.interface.on_device import sample_classes, to_device
from harness.interface.workload import Batch, Split, Workload, WorkloadSpec

CPU = torch.device("cpu")
STEPS = 80
"""Budget of the problem."""
TARGET_LOSS = 0.9
"""Training loss to reach within it; it starts near log 3 = 1.1."""


class _ModelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    dtype: Literal["float32", "bfloat16"] = "float32"


class _DataOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(nn.Module):
    """Tokens [n, 4] to logits [n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        # The transpose makes it non-contiguous.
        self.transposed = nn.Parameter((torch.randn(4, 8) / 8**0.5).t())
        self.head = nn.Linear(4, 3)
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.batch_norm(self.convolution(self.embedding(tokens).transpose(1, 2))).mean(2)
        x = torch.tanh(self.hidden(self.norm(x) * self.frozen)) @ self.transposed
        # empty.sum() is 0 and gives the empty parameter a gradient.
        return self.head(x) * self.scalar + self.empty.sum()


class Problem(Workload):
    """Sequences of four tokens in three classes, by their sum."""

    Model = _ModelOptions
    Data = _DataOptions
    loss_type = "softmax_cross_entropy"

    @override
    def load(self, source: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(6, (256, 4), generator=generator)
        total = tokens.sum(1)
        self._device = device
        self._tokens, self._classes = tokens.to(device), ((total > 8) * 1 + (total > 11) * 1).to(device)

    @property
    @override
    def fingerprint(self) -> dict[str, str]:
        return {}

    @property
    @override
    def train_size(self) -> int:
        return len(self._tokens)

    @override
    def build_model(self) -> nn.Module:
        return _Model().to(getattr(torch, self.model_options.dtype))

    @override
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        indices = to_device(indices, self._device)
        return {"inputs": self._tokens[indices], "labels": self._classes[indices]}

    @override
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction=reduction)

    @override
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return sample_classes(outputs.float().softmax(-1), generator)

    @override
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        yield from [{"inputs": self._tokens, "labels": self._classes}][part]

    @override
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss(outputs, batch, "none").sum(), "num_examples": torch.tensor(len(batch["labels"]))}


def make_problem(dtype: str = "float32", device: torch.device = CPU) -> Problem:
    """The problem with its data on `device`. dtype: of the parameters, float32 or bfloat16."""
    spec: dict[str, Any] = dict(
        name="conformance", description="", class_path="harness.trial.conformance_problem.Problem", version=1,
        metric="loss", direction="min", target=TARGET_LOSS, target_version=1, nominal_batch=32, micro_batch=16,
        max_steps=STEPS, eval_every=1, max_seconds=60.0, model={"dtype": dtype}, data={},
    )  # fmt: skip
    problem = Problem(WorkloadSpec(**spec))
    problem.load("", device)
    return problem
