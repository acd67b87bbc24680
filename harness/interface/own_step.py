"""The step of a submission that draws its batches and runs the passes itself (Need.OWN_PASSES).

What is drawn counts to the budget, whether it is used or not, and every pass counts with the examples that it sees. The
order of the examples, the dropout masks and the statistics of BatchNorm are those of every other submission.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.interface.data_order import ExampleStream, Selection
from harness.interface.model_runner import ModelRunner
from harness.interface.workload import Batch


@dataclass(frozen=True)
class DrawnBatch:
    """Examples that a step has drawn."""

    tensors: Batch
    """Those of this rank, end to end."""
    size: int
    """Examples over all ranks."""
    first_number: int
    """How many micro-batches the step had drawn before: by it dropout masks differ from batch to batch."""


class OwnStep:
    """One step, handed to ``Submission.step`` in place of a step context.

    step: nominal steps done before this one. first_loss: the loss that the record gets for the step, a scalar without a
    graph, set by the submission.
    """

    def __init__(
        self, runner: ModelRunner, stream: ExampleStream, step: float, load: Callable[[Selection], Batch]
    ) -> None:
        """load: loads this rank's examples of a selection, and counts the time."""
        self.step = step
        self.first_loss: Tensor | None = None
        self.examples = 0
        """Drawn in this step."""
        self._runner, self._stream, self._load = runner, stream, load
        self._micro_batches = 0
        # Whatever the submission itself draws from torch's generator is then a function of the step.
        runner.seeds.seed_model_randomness(runner.counters.update_steps, 65_536)

    @property
    def number(self) -> int:
        """How many steps were made before."""
        return self._runner.counters.update_steps

    def draw(self, count: int) -> DrawnBatch:
        """The next `count` examples of the default order, loaded."""
        return DrawnBatch(self._load(self._stream.take(count)), count, self._count(count))

    def skip(self, count: int) -> None:
        """Let the next `count` examples go, unseen."""
        self._stream.take(count)
        self._count(count)

    def outputs(
        self,
        batch: Batch,
        *,
        of: DrawnBatch | None = None,
        update_buffers: bool = True,
        model: nn.Module | None = None,
    ) -> Tensor:
        """The model's outputs on this rank's examples, with their graph where gradients are on; one forward.

        batch: as `Workload.batch` returns it, also changed. of: what it was drawn as, for its dropout masks and the
        number of examples of all ranks; None for examples of the submission's own making. update_buffers: leave new
        statistics of BatchNorm in the model. model: the same model in a wrapper, such as DistributedDataParallel.
        """
        runner = self._runner
        rows = len(batch["labels"])
        size = of.size if of is not None and rows == len(of.tensors["labels"]) else rows * runner.ranks.size
        pieces, offset = runner.split_batch(batch, size), 0 if of is None else of.first_number
        forward_model = runner.forward_model if model is None else model
        outputs = []
        with runner.pass_context(), runner.averaged_buffers(pieces, update=update_buffers) as end_micro_batch:
            for number, micro_batch in pieces.micro_batches.items():
                runner.seeds.seed_model_randomness(runner.counters.update_steps, offset + number)
                with runner.precision_context():
                    outputs.append(runner.workload.forward(forward_model, micro_batch))
                end_micro_batch()
        runner.counters.forward_examples += size
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if result.requires_grad:
            result.register_hook(lambda _: self._count_backward(size))
        return result

    def _count(self, count: int) -> int:
        first_number = self._micro_batches
        self.examples += count
        self._runner.counters.examples += count
        self._micro_batches += -(-count // self._runner.workload.spec.micro_batch)
        return first_number

    def _count_backward(self, size: int) -> None:
        self._runner.counters.backward_examples += size
