"""Forward passes of one trial's model: micro-batches, buffers, precision and the counting of work.

The nominal batch is cut into micro-batches, so that it does not matter how many ranks share it. BatchNorm statistics
and dropout masks belong to a micro-batch. Only the first forward of a step moves the model's buffers: each micro-batch
starts from the step's initial buffers, and the step ends with the mean of the buffers after each, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harness.interface.data_order import Selection
from harness.interface.gradient_buckets import GradientBuckets
from harness.interface.ranks import SINGLE_RANK, Ranks
from harness.interface.workload import Batch, Workload
from harness.seeding import TrialSeeds


@dataclass
class Counters:
    """Work done so far, in examples; `examples` is also the position on the workload's budget."""

    update_steps: int = 0
    examples: int = 0
    forward_examples: int = 0
    backward_examples: int = 0


@dataclass(frozen=True)
class StepBatch:
    """The examples of one step, as far as this rank runs them."""

    micro_batches: dict[int, Batch]
    """By their number in the step."""
    shares: tuple[int, ...]
    """How many micro-batches each rank runs."""
    micro: int
    """Examples of each micro-batch but the last."""
    size: int
    """Examples of the whole step, over all ranks."""
    idle: bool = False
    """This rank has no micro-batch, because there are fewer than ranks. It runs micro-batch 0 again with zero weight,
    so that its set of parameters with gradients matches the other ranks' (an all-reduce needs equal shapes)."""

    @property
    def count(self) -> int:
        """Micro-batches of the whole step."""
        return sum(self.shares)

    def split_further(self, at_least: int, ranks: Ranks) -> StepBatch:
        """The same examples in `at_least` micro-batches or more (over all ranks), as far as there are examples.

        Of a batch as the workload splits it: all micro-batches but the last must be of one size. Each rank splits the
        micro-batches that it has; no example moves to another rank.
        """
        pieces_each = -(-at_least // self.count)
        if pieces_each <= 1:
            return self
        # Of the workload's micro-batches only the last can be smaller; it may have fewer examples than pieces.
        sizes = [min(self.micro, self.size - k * self.micro) for k in range(self.count)]
        shares = tuple(
            sum(min(pieces_each, sizes[k]) for k in ranks.share(self.count, rank)) for rank in range(ranks.size)
        )
        micro_batches: dict[int, Batch] = {}
        for k, batch in self.micro_batches.items():
            parts = {name: tensor.tensor_split(pieces_each) for name, tensor in batch.items()}
            # tensor_split puts the empty pieces last; they are left out.
            for j in range(min(pieces_each, sizes[k])):
                micro_batches[k * pieces_each + j] = {name: part[j] for name, part in parts.items()}
        return StepBatch(micro_batches, shares, -(-self.micro // pieces_each), self.size, self.idle)


class ModelRunner:
    """A trial's model with all that its forward passes need: workload, precision, seeds, buffers, ranks, counters."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        seeds: TrialSeeds,
        precision_context: Callable[[], AbstractContextManager[object]],
        ranks: Ranks = SINGLE_RANK,
        *,
        compiled: bool = False,
        sizes_vary: bool = False,
        pass_context: Callable[[], AbstractContextManager[object]] = nullcontext,
        count_compiled: Callable[[int], None] | None = None,
    ) -> None:
        """compiled: whether forward passes go through torch.compile, and the loss with them. sizes_vary: whether
        micro-batches of other sizes than the workload's will come. pass_context: entered around every pass.
        count_compiled: called with the number of examples of each compiled pass, which no hook of the model sees."""
        self.workload = workload
        self.model = model
        loss = BatchLoss(workload, model)
        # The loss is compiled with the model: alone, it would write and read the logits several times.
        self.forward_model: Any = torch.compile(model) if compiled else model
        self._loss: Any = torch.compile(loss) if compiled else loss
        self._marks_sizes = compiled and sizes_vary
        self._count_compiled = count_compiled if compiled else None
        self.pass_context = pass_context
        self.seeds = seeds
        self.precision_context = precision_context
        self.ranks = ranks
        self.counters = Counters()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Without those that have no elements: there is nothing to average.
        self.buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self.packed_buffers = PackedBuffers(self.buffers)
        self._label_generator: torch.Generator | None = None

    @cached_property
    def gradient_buckets(self) -> GradientBuckets | None:
        """Sums the gradients over the ranks; None for one rank."""
        return GradientBuckets(self.parameters) if self.ranks.size > 1 else None

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch, a scalar with its graph."""
        if self._marks_sizes:
            # One compilation for all sizes.
            for tensor in batch.values():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        loss: Tensor = self._loss(batch)
        if self._count_compiled is not None:
            self._count_compiled(len(batch["labels"]))
        return loss

    def outputs(self, batch: Batch) -> Tensor:
        """The model's outputs on a micro-batch, with their graph."""
        outputs = self.workload.forward(self.forward_model, batch)
        if self._count_compiled is not None:
            self._count_compiled(len(batch["labels"]))
        return outputs

    def load_batch(self, selection: Selection) -> StepBatch:
        """Load those micro-batches of `selection` that this rank runs."""
        return self.split_batch(self.load_examples(selection), len(selection.indices))

    def load_examples(self, selection: Selection) -> Batch:
        """Load those examples of `selection` that this rank runs, end to end."""
        local = self.local_slice(len(selection.indices))
        return self.workload.batch(selection.indices[local], selection.keys[local])

    def split_batch(self, batch: Batch, size: int) -> StepBatch:
        """The micro-batches of this rank's examples `batch`, of a step that has `size` examples over all ranks."""
        micro = self.workload.spec.micro_batch
        local = self.local_slice(size)
        count = -(-size // micro)
        pieces = {name: tensor.split(micro) for name, tensor in batch.items()}
        # Micro-batches keep their number in the step, which seeds dropout, whatever rank runs them.
        first = local.start // micro
        micro_batches = {
            first + i: {name: parts[i] for name, parts in pieces.items()} for i in range(len(pieces["labels"]))
        }
        return StepBatch(micro_batches, self.ranks.shares(count), micro, size, idle=not self.ranks.share(count))

    def local_slice(self, size: int) -> slice:
        """Which of a step's `size` examples this rank loads; the first micro-batch if it has none of its own."""
        micro = self.workload.spec.micro_batch
        # A rank without a share loads micro-batch 0; see StepBatch.idle.
        share = self.ranks.share(-(-size // micro)) or range(1)
        return slice(share.start * micro, share.stop * micro)

    @contextmanager
    def averaged_buffers(self, batch: StepBatch, *, update: bool) -> Iterator[Callable[[], None]]:
        """Manage the buffers over the micro-batches of one pass; yields a function to call after each micro-batch.

        update: leave the mean over the micro-batches of all ranks in the buffers; else restore their former values.
        """
        packed = self.packed_buffers
        # A single micro-batch leaves its statistics in the buffers, which is their mean already.
        # batch.count, and not this rank's number: either all ranks take part in the gather at the end or none.
        managed = bool(self.buffers) and (batch.count > 1 or not update)
        initial = packed.unpack(packed.read()) if managed else []
        after_each: list[list[Tensor]] = []

        def end_micro_batch() -> None:
            if managed:
                after_each.append(packed.read())
                # Each micro-batch starts from the same buffers, so that it does not matter which rank runs it.
                packed.write(initial)

        yield end_micro_batch
        if managed and update:
            self._write_mean_buffers(batch, after_each)

    def _write_mean_buffers(self, batch: StepBatch, after_each: Sequence[Sequence[Tensor]]) -> None:
        # An idle rank sends no row: micro-batch 0 comes from the rank that it belongs to.
        local = [torch.stack(rows)[: 0 if batch.idle else None] for rows in zip(*after_each, strict=True)]
        # Counters (each advanced once from the same start) agree, so the largest is the one.
        means = [
            rows.mean(0) if rows.is_floating_point() else rows.amax(0)
            for rows in self.ranks.all_gather_rows(local, batch.shares)
        ]
        self.packed_buffers.write(self.packed_buffers.unpack(means))

    @property
    def label_generator(self) -> torch.Generator:
        """A generator on the model's device for sampled labels. Every use seeds it, so it is not in the checkpoint."""
        if self._label_generator is None:
            self._label_generator = torch.Generator(self.parameters[0].device)
        return self._label_generator


class BatchLoss(nn.Module):
    """The workload's loss of a batch, as a module that torch.compile takes as a whole."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.workload = workload
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss, a scalar."""
        return self.workload.loss(self.workload.forward(self.model, batch), batch)


class PackedBuffers:
    """A model's buffers, read and written in a few operations, since a step does both for every micro-batch."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        # Through .data: BatchNorm saves its statistics for the backward pass without reading them, and a counted
        # in-place write would make autograd refuse a graph that is still in use.
        data = [buffer.data for buffer in buffers]
        self._by_dtype = [[b for b in data if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in data)]

    def read(self) -> list[Tensor]:
        """Copies of all buffers end to end: one tensor [elements] for each dtype."""
        return [torch.cat([buffer.reshape(-1) for buffer in buffers]) for buffers in self._by_dtype]

    def unpack(self, packed: Sequence[Tensor]) -> list[list[Tensor]]:
        """The result of `read` as views in the shapes of the buffers, for `write`."""
        return [
            [piece.view(b.shape) for piece, b in zip(flat.split([b.numel() for b in buffers]), buffers, strict=True)]
            for flat, buffers in zip(packed, self._by_dtype, strict=True)
        ]

    def write(self, values: Sequence[Sequence[Tensor]]) -> None:
        """Copy `values` (of `unpack`) into the buffers."""
        for buffers, new in zip(self._by_dtype, values, strict=True):
            torch._foreach_copy_(buffers, list(new))
