"""The step context: losses and derivatives that a submission may compute on the batch of one step.

Every forward of a step sees the same examples with the same randomness. Losses and gradients are means over the whole
batch, added up in the order of the micro-batches. Results of the ranks are reduced here, so that a submission sees the
same numbers on each, unless it declares Need.COMMUNICATION. How the passes run: harness/interface/model_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness import renamed
from harness.errors import UndeclaredNeed
from harness.interface.model_runner import ModelRunner, StepBatch
from harness.interface.needs import Need, require
from harness.interface.workload import Batch

Labels = Literal["true", "sampled"]
"""true: of the data; sampled: drawn from the model's own predictions."""


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within it the parameters hold `values` (copied); afterwards their own values are back to the bit."""
    # Values are copied in place: the compiled model, and optimizers that hold views of a parameter, keep its storage.
    own_values = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), list(values))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), own_values)


class StepContext:
    """The batch of one step, with its losses and derivatives. Made by the harness, handed to ``Submission.step``.

    step: nominal steps done before this one (a float when the batch size changes). first_loss: the mean loss of the
    step's first pass, a scalar without a graph; None before it.
    """

    def __init__(
        self, runner: ModelRunner, batch: StepBatch, step: float, needs: frozenset[Need], submission: str
    ) -> None:
        self.step = step
        self.first_loss: Tensor | None = None
        self._runner = runner
        self._parameters = runner.parameters
        # As the workload splits it: splitting further starts from here, whatever was asked for before.
        self._workload_batch = self._batch = batch
        self._needs = needs
        self._submission = submission
        self._passes = 0

    @property
    def batch_size(self) -> int:
        """Examples of the step, over all ranks."""
        return self._batch.size

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of ``Setup.parameters``."""
        return self._parameters

    @property
    def label_count(self) -> int:
        """Number of terms in the mean loss: examples, or tokens in language modelling."""
        labels = next(iter(self._batch.micro_batches.values()))["labels"]
        # Labels of floating point are a mixture of classes for each example.
        terms = len(labels) if labels.is_floating_point() else labels.numel()
        return terms // len(labels) * self._batch.size

    # ---- what a submission calls -------------------------------------------------------------------------------

    def backward(self) -> Tensor:
        """Put the gradient of the mean loss into ``.grad`` of every trainable parameter; returns the loss (a scalar
        without a graph).

        Parameters that the loss does not depend on keep ``grad=None``.
        """
        self._begin_pass("another gradient on the same batch")
        # None and not zero: update rules skip parameters without a gradient.
        for parameter in self._parameters:
            parameter.grad = None

        buckets = None if Need.COMMUNICATION in self._needs else self._runner.gradient_buckets
        passes_left = len(self._batch.micro_batches)

        def accumulate(loss: Tensor, weight: float) -> None:
            nonlocal passes_left
            passes_left -= 1
            # The last micro-batch completes the gradients.
            with buckets.sending() if buckets is not None and not passes_left else nullcontext():
                # A step of one micro-batch saves the multiplication and its backward.
                (loss if weight == 1 else loss * weight).backward()

        loss = self._run_micro_batches(accumulate, "true")
        if buckets is not None:
            buckets.finish()
        return self._reduce(loss)

    @renamed.arguments(at="params")
    def gradients(
        self, *, params: Sequence[Tensor] | None = None, labels: Labels = "true", create_graph: bool = False
    ) -> list[Tensor]:
        """The gradient of the mean loss as a list parallel to ``Setup.parameters``, zeros where it does not depend on
        one.

        params: values of the parameters at which to take it (default: the current ones, which stay as they are either
        way). labels: "sampled" draws them from the model's predictions. create_graph: differentiable once more.
        """
        return self._loss_and_gradients(params, labels, create_graph)[1]

    @renamed.arguments(at="params")
    def loss_and_gradients(
        self, *, params: Sequence[Tensor] | None = None, create_graph: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss (a scalar without a graph) and its gradient as in `gradients`, from one forward."""
        return self._loss_and_gradients(params, "true", create_graph)

    @renamed.arguments(at="params")
    def loss(self, *, params: Sequence[Tensor] | None = None, labels: Labels = "true") -> Tensor:
        """The mean loss without a gradient, a scalar; one forward. Arguments as of `gradients`."""
        self._require(Need.LOSS, "the loss value")
        self._begin_pass("another loss on the same batch")
        if labels == "sampled":
            self._require(Need.SAMPLED_LABELS, "sampled labels")
        with torch.no_grad(), self._parameters_set_to(params):
            return self._reduce(self._run_micro_batches(None, labels))

    @renamed.arguments(at="params")
    def hessian_vector_product(
        self, vectors: Sequence[Tensor], *, params: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The Hessian of the mean loss times `vectors`, by double backward; both lists are parallel to the parameters.

        params: values of the parameters at which to take it.
        """
        self._require(Need.SECOND_DERIVATIVES, "a Hessian-vector product")
        self._begin_pass("another evaluation of the same batch", allowed_by=Need.SECOND_DERIVATIVES)
        # Zeros remain for parameters that the loss does not depend on.
        product = [torch.zeros_like(parameter) for parameter in self._parameters]

        def accumulate(loss: Tensor, weight: float) -> None:
            first = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
            # A parameter in which the loss is linear has a constant gradient, which cannot be differentiated.
            differentiable = [(g, v) for g, v in zip(first, vectors, strict=True) if g.requires_grad]
            second = torch.autograd.grad(
                [g for g, _ in differentiable],
                self._parameters,
                grad_outputs=[v for _, v in differentiable],
                materialize_grads=True,
            )
            torch._foreach_add_(product, second, alpha=weight)

        with self._parameters_set_to(params):
            self._reduce(self._run_micro_batches(accumulate, "true", backward_passes=2), product)
        return product

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """The gradient of each micro-batch's own mean loss, a list parallel to the parameters for each, from one pass;
        the gradient of the whole batch goes into ``.grad`` as in `backward`.

        at_least: split the batch into this many micro-batches (as far as it has examples) where the workload has fewer.
        BatchNorm statistics and dropout masks then belong to the smaller micro-batches.
        """
        self._require(Need.MICRO_BATCH_GRADIENTS, "micro-batch gradients")
        self._begin_pass("another evaluation of the same batch")
        at_least = max(at_least, self._batch.count)
        self._batch = self._workload_batch.split_further(at_least, self._runner.ranks)
        gradient_lists: list[list[Tensor]] = []
        for parameter in self._parameters:
            parameter.grad = None

        def accumulate(loss: Tensor, weight: float) -> None:
            # allow_unused: .grad of a parameter that the loss does not depend on stays None, as after backward().
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    # gradient * weight is a new tensor also for weight 1: add_ must not change the one that is kept.
                    total = parameter.grad
                    parameter.grad = gradient * weight if total is None else total.add_(gradient, alpha=weight)
            gradient_lists.append(
                [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, gradients, strict=True)]
            )

        loss = self._run_micro_batches(accumulate, "true")
        self._reduce(loss, [parameter.grad for parameter in self._parameters if parameter.grad is not None])
        ranks, batch = self._runner.ranks, self._batch
        if ranks.size == 1:
            return gradient_lists
        if batch.idle:
            # Its gradients are those of micro-batch 0, which another rank sends.
            gradient_lists = []
        # One parameter at a time: all gradients of all micro-batches are large.
        gathered = [
            ranks.all_gather_rows([_stack_rows([gradients[i] for gradients in gradient_lists], p)], batch.shares)[0]
            for i, p in enumerate(self._parameters)
        ]
        return [list(gradients) for gradients in zip(*(rows.unbind() for rows in gathered), strict=True)]

    # ---- how it is done ----------------------------------------------------------------------------------------

    def _loss_and_gradients(
        self, params: Sequence[Tensor] | None, labels: Labels, create_graph: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss and its gradient over all ranks. Raises UndeclaredNeed, and RuntimeError for create_graph on
        several ranks."""
        self._begin_pass("another gradient on the same batch")
        if labels == "sampled":
            self._require(Need.SAMPLED_LABELS, "sampled labels")
        if create_graph:
            self._require(Need.SECOND_DERIVATIVES, "a differentiable gradient")
            if self._runner.ranks.size > 1:
                raise RuntimeError(
                    f"{self._submission} asked for a differentiable gradient, whose derivative the ranks cannot "
                    "reduce; use hessian_vector_product, or one process"
                )
        total: list[Tensor] = []

        def accumulate(loss: Tensor, weight: float) -> None:
            nonlocal total
            pieces = torch.autograd.grad(loss, self._parameters, create_graph=create_graph, materialize_grads=True)
            if weight == 1:
                total = list(pieces)
            elif not total:
                total = [piece * weight for piece in pieces]
            elif create_graph:
                # In-place addition would overwrite tensors that the graph of the second derivative needs.
                total = [sum_ + piece * weight for sum_, piece in zip(total, pieces, strict=True)]
            else:
                torch._foreach_add_(total, pieces, alpha=weight)

        with self._parameters_set_to(params):
            loss = self._run_micro_batches(accumulate, labels)
            return self._reduce(loss, total), total

    def _run_micro_batches(
        self, use_loss: Callable[[Tensor, float], None] | None, labels: Labels, backward_passes: int = 1
    ) -> Tensor:
        """Forward each micro-batch of this rank and hand its loss and its weight in the mean to `use_loss`; returns
        this rank's part of the mean loss, a scalar without a graph."""
        batch, counters = self._batch, self._runner.counters
        # Under Need.COMMUNICATION gradients are means over this rank's examples; the submission averages over ranks.
        divisor = batch.size / self._runner.ranks.size if Need.COMMUNICATION in self._needs else batch.size
        total: Tensor | None = None
        # Only the first pass moves the buffers: BatchNorm statistics do not depend on how many passes a step takes.
        with (
            self._runner.pass_context(),
            self._runner.averaged_buffers(batch, update=self._passes == 1) as end_micro_batch,
        ):
            for number, micro_batch in batch.micro_batches.items():
                loss = self._micro_batch_loss(number, micro_batch, labels)
                # A weight by size makes the sum the mean over all examples where the last micro-batch is smaller.
                weight = 0.0 if batch.idle else len(micro_batch["labels"]) / divisor
                if use_loss is not None:
                    use_loss(loss, weight)
                weighted = loss.detach() if weight == 1 else loss.detach() * weight
                total = weighted if total is None else total + weighted
                # Frees the graph and with it the logits, which are large, before the next forward needs the room.
                del loss
                end_micro_batch()
            # Of all ranks, so that the counters do not depend on how many share the step.
            counters.forward_examples += batch.size
            counters.backward_examples += backward_passes * batch.size * (use_loss is not None)
        assert total is not None
        return total

    def _micro_batch_loss(self, number: int, micro_batch: Batch, labels: Labels) -> Tensor:
        runner = self._runner
        # By step and number, and not by pass: every pass of a step sees the same dropout masks.
        runner.seeds.seed_model_randomness(runner.counters.update_steps, number)
        with runner.precision_context():
            if labels == "true":
                return runner.batch_loss(micro_batch)
            outputs = runner.outputs(micro_batch)
            sampled = {"labels": self._sample_labels(outputs.detach(), number)}
            return runner.workload.loss(outputs, micro_batch | sampled)

    def _sample_labels(self, outputs: Tensor, number: int) -> Tensor:
        runner, generator = self._runner, self._runner.label_generator
        # By pass as well: each pass draws labels of its own.
        runner.seeds.seed_labels(generator, runner.counters.update_steps, self._passes, number)
        return runner.workload.sample_labels(outputs, generator)

    def _reduce(self, loss: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
        """The mean loss over all ranks; the gradients become those of it, in place."""
        ranks = self._runner.ranks
        own_communication = Need.COMMUNICATION in self._needs
        if ranks.size > 1:
            loss = loss.clone()
            # Under Need.COMMUNICATION the submission reduces the gradients itself.
            ranks.all_reduce_sum_([loss] if own_communication else [loss, *gradients])
            if own_communication:
                loss /= ranks.size
        if self.first_loss is None:
            self.first_loss = loss
        return loss

    def _begin_pass(self, asked: str, allowed_by: Need = Need.RE_EVALUATE) -> None:
        self._passes += 1
        if self._passes > 1 and not self._needs & {Need.RE_EVALUATE, allowed_by}:
            raise UndeclaredNeed(asked, (Need.RE_EVALUATE.name, Need.RE_EVALUATE.value), self._submission)

    def _require(self, need: Need, asked: str) -> None:
        require(need, self._needs, asked, self._submission)

    @contextmanager
    def _parameters_set_to(self, params: Sequence[Tensor] | None) -> Iterator[None]:
        if params is None:
            yield
        else:
            with swapped(self._parameters, params):
                yield


class WrappedContext:
    """A step context with another gradient, which a wrapper hands to the submission inside it.

    A subclass defines `backward`, on `self.ctx`. Gradients at given parameters, on sampled labels and of micro-batches
    are those of `self.ctx`.
    """

    def __init__(self, ctx: StepContext) -> None:
        self.ctx = ctx

    # Everything that is not overridden is the wrapped context's, including what later versions add.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def backward(self) -> Tensor:
        """As `StepContext.backward`; to be overridden."""
        return self.ctx.backward()

    @renamed.arguments(at="params")
    def gradients(
        self, *, params: Sequence[Tensor] | None = None, labels: Labels = "true", create_graph: bool = False
    ) -> list[Tensor]:
        """As `StepContext.gradients`, by `backward` where no argument is given."""
        if params is not None or labels != "true" or create_graph:
            return self.ctx.gradients(params=params, labels=labels, create_graph=create_graph)
        return self.loss_and_gradients()[1]

    @renamed.arguments(at="params")
    def loss_and_gradients(
        self, *, params: Sequence[Tensor] | None = None, create_graph: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """As `StepContext.loss_and_gradients`, by `backward` where no argument is given."""
        if params is not None or create_graph:
            return self.ctx.loss_and_gradients(params=params, create_graph=create_graph)
        loss = self.backward()
        return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.ctx.parameters]


def _stack_rows(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stacked along a new first dimension; [0, ...] where there is none."""
    return torch.stack(list(values)) if values else like.detach().new_empty(0, *like.shape)
