"""The step context: what a submission may do with the batch of one step.

Every forward of a step sees the same examples with the same randomness. The nominal batch is cut into micro-batches;
losses and gradients are means over the whole batch, added up in micro-batch order. Only the first forward of a step
moves the model's buffers (BatchNorm statistics): each micro-batch starts from the step's initial buffers, and the step
ends with their mean in micro-batch order, so that it does not matter how many ranks share the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.needs import Need, UndeclaredNeed
from harness.seeding import TrialSeeds
from harness.workload import Batch, Workload

Labels = Literal["true", "sampled"]


@dataclass
class Counters:
    """Work done so far, in examples; `examples` also is the position on the workload's budget."""

    update_steps: int = 0
    examples: int = 0
    forward_examples: int = 0
    backward_examples: int = 0


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters other values for a while; their own come back to the bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), list(values))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), own)


class Evaluator:
    """Forward passes of one trial's model: precision, randomness, buffers and counting, the same for every step."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        seeds: TrialSeeds,
        precision_context: Callable[[], AbstractContextManager[object]],
        forward_model: nn.Module | None = None,
    ) -> None:
        self.workload = workload
        self.model = model
        self.forward_model = forward_model if forward_model is not None else model
        self.seeds = seeds
        self.precision_context = precision_context
        self.counters = Counters()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = [buffer for buffer in model.buffers() if buffer.numel()]

    def split(self, batch: Batch, micro: int | None = None) -> list[Batch]:
        size = len(batch["labels"])
        micro = micro or self.workload.facts.micro_batch
        if size <= micro:
            return [batch]
        pieces = {name: tensor.split(micro) for name, tensor in batch.items()}
        return [{name: tensors[i] for name, tensors in pieces.items()} for i in range(len(pieces["labels"]))]


class StepContext:
    """One step's batch, and what may be computed on it. Made by the harness, handed to ``Submission.step``.

    step: nominal steps done before this one (a float when the batch size changes).
    """

    def __init__(
        self,
        evaluator: Evaluator,
        batch: Batch,
        step: float,
        needs: frozenset[Need],
        submission: str,
        label_generator: torch.Generator | None = None,
    ) -> None:
        self.step = step
        self._evaluator = evaluator
        self._parameters = evaluator.parameters
        self._batch = batch
        self._micro_batches = evaluator.split(batch)
        self._size = len(batch["labels"])
        self._needs = needs
        self._submission = submission
        self._label_generator = label_generator
        self._forwards = 0
        self.first_loss: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self._size

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    @property
    def label_count(self) -> int:
        """Terms of the mean loss: examples, or tokens in language modelling."""
        return sum(batch["labels"].numel() for batch in self._micro_batches)

    # ---- what a submission calls -------------------------------------------------------------------------------

    def backward(self) -> Tensor:
        """Put the gradient of the mean loss into ``.grad`` of every trainable parameter; returns the loss (no graph).

        Parameters the loss does not depend on keep ``grad=None``.
        """
        self._begin_pass("another gradient on the same batch")
        for parameter in self._parameters:
            parameter.grad = None

        def one(loss: Tensor, weight: float) -> None:
            (loss if weight == 1 else loss * weight).backward()

        return self._over_micro_batches(one, "true")

    def gradients(
        self, *, at: Sequence[Tensor] | None = None, labels: Labels = "true", create_graph: bool = False
    ) -> list[Tensor]:
        """Gradient of the mean loss as a list parallel to ``Setup.parameters``, zeros where it does not depend on one.

        at: values of the parameters to take it at (default: the current ones, which are untouched either way).
        labels: "sampled" draws them from the model's predictions. create_graph: differentiable once more.
        """
        return self._gradients(at, labels, create_graph)[1]

    def loss_and_gradients(self, *, at: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The mean loss (no graph) and its gradient, from one forward."""
        return self._gradients(at, "true", False)

    def loss(self, *, at: Sequence[Tensor] | None = None, labels: Labels = "true") -> Tensor:
        """The mean loss without a gradient; one forward."""
        self._require(Need.LOSS, "the loss value")
        self._begin_pass("another loss on the same batch")
        if labels == "sampled":
            self._require(Need.SAMPLED_LABELS, "sampled labels")
        with torch.no_grad(), self._moved(at):
            return self._over_micro_batches(None, labels)

    def hessian_vector_product(self, vectors: Sequence[Tensor], *, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Hessian of the mean loss times `vectors` (a list parallel to the parameters), by double backward."""
        self._require(Need.SECOND_DERIVATIVES, "a Hessian-vector product")
        self._begin_pass("another evaluation of the same batch", allowed_by=Need.SECOND_DERIVATIVES)
        total = [torch.zeros_like(parameter) for parameter in self._parameters]

        def one(loss: Tensor, weight: float) -> None:
            first = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
            differentiable = [(g, v) for g, v in zip(first, vectors, strict=True) if g.requires_grad]
            second = torch.autograd.grad(
                [g for g, _ in differentiable],
                self._parameters,
                grad_outputs=[v for _, v in differentiable],
                materialize_grads=True,
            )
            torch._foreach_add_(total, second, alpha=weight)

        with self._moved(at):
            self._over_micro_batches(one, "true", backwards=2)
        return total

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """One gradient list per micro-batch, each of that micro-batch's own mean loss, from one pass; the gradient of
        the whole batch goes into ``.grad`` as in `backward`.

        at_least: cut the batch into this many micro-batches (as far as it has examples) where the workload has fewer.
        Their BatchNorm statistics and dropout masks are then those of the smaller micro-batches.
        """
        self._require(Need.MICRO_BATCH_GRADIENTS, "micro-batch gradients")
        self._begin_pass("another evaluation of the same batch")
        pieces: list[list[Tensor]] = []
        if len(self._micro_batches) < at_least:
            self._micro_batches = self._evaluator.split(self._batch, max(1, self._size // at_least))
        for parameter in self._parameters:
            parameter.grad = None

        def one(loss: Tensor, weight: float) -> None:
            piece = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for parameter, gradient in zip(self._parameters, piece, strict=True):
                if gradient is not None:
                    before = parameter.grad
                    parameter.grad = gradient * weight if before is None else before.add_(gradient, alpha=weight)
            pieces.append(
                [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, piece, strict=True)]
            )

        self._over_micro_batches(one, "true")
        return pieces

    # ---- how it is done ----------------------------------------------------------------------------------------

    def _gradients(
        self, at: Sequence[Tensor] | None, labels: Labels, create_graph: bool
    ) -> tuple[Tensor, list[Tensor]]:
        self._begin_pass("another gradient on the same batch")
        if labels == "sampled":
            self._require(Need.SAMPLED_LABELS, "sampled labels")
        if create_graph:
            self._require(Need.SECOND_DERIVATIVES, "a differentiable gradient")
        total: list[Tensor] = []

        def one(loss: Tensor, weight: float) -> None:
            nonlocal total
            pieces = torch.autograd.grad(loss, self._parameters, create_graph=create_graph, materialize_grads=True)
            if weight == 1:
                total = list(pieces)
            elif not total:
                total = [piece * weight for piece in pieces]
            elif create_graph:
                total = [sum_ + piece * weight for sum_, piece in zip(total, pieces, strict=True)]
            else:
                torch._foreach_add_(total, pieces, alpha=weight)

        with self._moved(at):
            return self._over_micro_batches(one, labels), total

    def _over_micro_batches(
        self, use: Callable[[Tensor, float], None] | None, labels: Labels, backwards: int = 1
    ) -> Tensor:
        """Forward each micro-batch, hand its loss and weight to `use`; returns the mean loss without a graph."""
        evaluator, workload = self._evaluator, self._evaluator.workload
        keep_buffers = self._forwards > 1 and evaluator.buffers
        several = len(self._micro_batches) > 1
        initial = [b.detach().clone() for b in evaluator.buffers] if keep_buffers or several else []
        final: list[list[Tensor]] = []
        mean: Tensor | None = None
        for k, batch in enumerate(self._micro_batches):
            evaluator.seeds.seed_model_randomness(evaluator.counters.update_steps, k)
            with evaluator.precision_context():
                outputs = workload.forward(evaluator.forward_model, batch)
                if labels == "sampled":
                    assert self._label_generator is not None
                    batch = batch | {"labels": workload.sample_labels(outputs.detach(), self._label_generator)}
                loss = workload.loss(outputs, batch)
            count = len(batch["labels"])
            weight = count / self._size
            evaluator.counters.forward_examples += count
            if use is not None:
                use(loss, weight)
                evaluator.counters.backward_examples += backwards * count
            part = loss.detach() if weight == 1 else loss.detach() * weight
            mean = part if mean is None else mean + part
            if initial:
                final.append([b.detach().clone() for b in evaluator.buffers])
                _set_buffers(evaluator.buffers, initial)
        if initial and not keep_buffers:
            _set_buffers(evaluator.buffers, [_combine(values) for values in zip(*final, strict=True)])
        assert mean is not None
        if self.first_loss is None:
            self.first_loss = mean
        return mean

    def _begin_pass(self, asked: str, allowed_by: Need = Need.RE_EVALUATE) -> None:
        self._forwards += 1
        if self._forwards > 1 and not self._needs & {Need.RE_EVALUATE, allowed_by}:
            raise UndeclaredNeed(asked, Need.RE_EVALUATE, self._submission)

    def _require(self, need: Need, asked: str) -> None:
        if need not in self._needs:
            raise UndeclaredNeed(asked, need, self._submission)

    @contextmanager
    def _moved(self, at: Sequence[Tensor] | None) -> Iterator[None]:
        if at is None:
            yield
        else:
            with swapped(self._parameters, at):
                yield


class WrappedContext:
    """A step context with another gradient: what a wrapper hands to the submission inside it.

    A subclass defines `backward`, on `self.ctx`. Gradients at given points, on sampled labels and of micro-batches stay
    what they were.
    """

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def backward(self) -> Tensor:
        return self.ctx.backward()

    def gradients(
        self, *, at: Sequence[Tensor] | None = None, labels: Labels = "true", create_graph: bool = False
    ) -> list[Tensor]:
        if at is not None or labels != "true" or create_graph:
            return self.ctx.gradients(at=at, labels=labels, create_graph=create_graph)
        return self.loss_and_gradients()[1]

    def loss_and_gradients(self, *, at: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        if at is not None:
            return self.ctx.loss_and_gradients(at=at)
        loss = self.backward()
        return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.ctx.parameters]


def _set_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    # Through .data: BatchNorm saves its statistics for the backward pass without reading them, and a counted in-place
    # write would make autograd refuse a graph that is still in use.
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)


def _combine(values: Sequence[Tensor]) -> Tensor:
    """Mean of floating buffers; counters (each advanced once from the same start) agree, so the largest is the one."""
    stacked = torch.stack(list(values))
    return stacked.mean(0) if stacked.is_floating_point() else stacked.amax(0)
