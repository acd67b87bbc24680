"""The step context: what a submission may do with the batch of one step.

Every forward of a step sees the same examples with the same randomness. The nominal batch is cut into micro-batches;
losses and gradients are means over the whole batch, added up in micro-batch order. Only the first forward of a step
moves the model's buffers (BatchNorm statistics): each micro-batch starts from the step's initial buffers, and the step
ends with their mean in micro-batch order, so that it does not matter how many ranks share the micro-batches. What the
ranks find is added up here; a submission sees the same numbers on each, unless it owns the communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.needs import Need, UndeclaredNeed
from harness.ranks import ALONE, Ranks
from harness.seeding import Selection, TrialSeeds
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


@dataclass(frozen=True)
class NominalBatch:
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
    """The step has fewer micro-batches than there are ranks, and none for this one: it runs the first one beside rank
    0, with a weight of zero, so that it knows which parameters have a gradient."""

    @property
    def count(self) -> int:
        return sum(self.shares)

    def cut(self, at_least: int, ranks: Ranks) -> NominalBatch:
        """The same examples in `at_least` micro-batches or more, as far as they suffice."""
        times = -(-at_least // self.count)
        if times <= 1:
            return self
        sizes = [min(self.micro, self.size - k * self.micro) for k in range(self.count)]
        shares = tuple(sum(min(times, sizes[k]) for k in ranks.share(self.count, rank)) for rank in range(ranks.size))
        pieces: dict[int, Batch] = {}
        for k, batch in self.micro_batches.items():
            parts = {name: tensor.tensor_split(times) for name, tensor in batch.items()}
            for j in range(min(times, sizes[k])):
                pieces[k * times + j] = {name: part[j] for name, part in parts.items()}
        return NominalBatch(pieces, shares, -(-self.micro // times), self.size, self.idle)


class Evaluator:
    """Forward passes of one trial's model: precision, randomness, buffers and counting, the same for every step."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        seeds: TrialSeeds,
        precision_context: Callable[[], AbstractContextManager[object]],
        forward_model: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.workload = workload
        self.model = model
        self.forward_model = forward_model if forward_model is not None else model
        self.seeds = seeds
        self.precision_context = precision_context
        self.ranks = ranks
        self.counters = Counters()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self.packed_buffers = _Packed(self.buffers)
        self._label_generator: torch.Generator | None = None

    def fetch(self, selection: Selection) -> NominalBatch:
        """The micro-batches of `selection` that are this rank's."""
        size, micro, mine = len(selection.indices), self.workload.facts.micro_batch, self.mine(len(selection.indices))
        count = -(-size // micro)
        batch = self.workload.batch(selection.indices[mine], selection.keys[mine])
        pieces = {name: tensor.split(micro) for name, tensor in batch.items()}
        numbered = {
            mine.start // micro + i: {name: cut[i] for name, cut in pieces.items()}
            for i in range(len(pieces["labels"]))
        }
        return NominalBatch(numbered, self.ranks.shares(count), micro, size, idle=not self.ranks.share(count))

    def mine(self, size: int) -> slice:
        """Which of a step's `size` examples this rank runs, the first micro-batch if it is idle."""
        micro = self.workload.facts.micro_batch
        share = self.ranks.share(-(-size // micro)) or range(1)
        return slice(share.start * micro, share.stop * micro)

    @property
    def label_generator(self) -> torch.Generator:
        """On the model's device; every use seeds it first."""
        if self._label_generator is None:
            self._label_generator = torch.Generator(self.parameters[0].device)
        return self._label_generator


class StepContext:
    """One step's batch, and what may be computed on it. Made by the harness, handed to ``Submission.step``.

    step: nominal steps done before this one (a float when the batch size changes).
    """

    def __init__(
        self,
        evaluator: Evaluator,
        batch: NominalBatch,
        step: float,
        needs: frozenset[Need],
        submission: str,
    ) -> None:
        self.step = step
        self._evaluator = evaluator
        self._parameters = evaluator.parameters
        self._batch = batch
        self._needs = needs
        self._submission = submission
        self._forwards = 0
        self.first_loss: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self._batch.size

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    @property
    def label_count(self) -> int:
        """Terms of the mean loss: examples, or tokens in language modelling."""
        labels = next(iter(self._batch.micro_batches.values()))["labels"]
        terms = len(labels) if labels.is_floating_point() else labels.numel()  # floating: a mixture for each example
        return terms // len(labels) * self._batch.size

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

        loss = self._over_micro_batches(one, "true")
        return self._added_up(loss, [parameter.grad for parameter in self._parameters if parameter.grad is not None])

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
            return self._added_up(self._over_micro_batches(None, labels))

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
            self._added_up(self._over_micro_batches(one, "true", backwards=2), total)
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
        self._batch = self._batch.cut(at_least, self._evaluator.ranks)
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

        loss = self._over_micro_batches(one, "true")
        self._added_up(loss, [parameter.grad for parameter in self._parameters if parameter.grad is not None])
        ranks, batch = self._evaluator.ranks, self._batch
        if ranks.size == 1:
            return pieces
        if batch.idle:
            pieces = []
        # One parameter at a time: all gradients of all micro-batches are large.
        whole = [ranks.in_order([_rows([piece[i] for piece in pieces], p)], batch.shares)[0]
                 for i, p in enumerate(self._parameters)]  # fmt: skip
        return [list(piece) for piece in zip(*(rows.unbind() for rows in whole), strict=True)]

    # ---- how it is done ----------------------------------------------------------------------------------------

    def _gradients(
        self, at: Sequence[Tensor] | None, labels: Labels, create_graph: bool
    ) -> tuple[Tensor, list[Tensor]]:
        self._begin_pass("another gradient on the same batch")
        if labels == "sampled":
            self._require(Need.SAMPLED_LABELS, "sampled labels")
        if create_graph:
            self._require(Need.SECOND_DERIVATIVES, "a differentiable gradient")
            if self._evaluator.ranks.size > 1:
                raise RuntimeError(
                    f"{self._submission} asked for a differentiable gradient, whose derivative the ranks could not add "
                    "up; use hessian_vector_product, or one process"
                )
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
            loss = self._over_micro_batches(one, labels)
            return self._added_up(loss, total), total

    def _over_micro_batches(
        self, use: Callable[[Tensor, float], None] | None, labels: Labels, backwards: int = 1
    ) -> Tensor:
        """Forward each micro-batch of this rank, hand its loss and weight to `use`; returns its part of the mean loss,
        without a graph."""
        evaluator, workload, whole = self._evaluator, self._evaluator.workload, self._batch
        keep_buffers = self._forwards > 1 and evaluator.buffers
        packed = evaluator.packed_buffers
        initial = packed.split(packed.read()) if keep_buffers or whole.count > 1 else []
        final: list[list[Tensor]] = []
        part: Tensor | None = None
        # Whoever owns the communication averages over the ranks, so its gradients are means over this rank's examples.
        over = whole.size / evaluator.ranks.size if Need.COMMUNICATION in self._needs else whole.size
        for k, batch in whole.micro_batches.items():
            evaluator.seeds.seed_model_randomness(evaluator.counters.update_steps, k)
            with evaluator.precision_context():
                outputs = workload.forward(evaluator.forward_model, batch)
                if labels == "sampled":
                    batch = batch | {"labels": self._sampled(outputs.detach(), k)}
                loss = workload.loss(outputs, batch)
            weight = 0.0 if whole.idle else len(batch["labels"]) / over
            if use is not None:
                use(loss, weight)
            weighted = loss.detach() if weight == 1 else loss.detach() * weight
            part = weighted if part is None else part + weighted
            del outputs, loss  # logits are large, and the next forward needs room
            if initial:
                final.append(packed.read())
                packed.write(initial)
        evaluator.counters.forward_examples += whole.size
        evaluator.counters.backward_examples += backwards * whole.size * (use is not None)
        if initial and not keep_buffers:
            self._combine_buffers(final)
        assert part is not None
        return part

    def _sampled(self, outputs: Tensor, micro_batch: int) -> Tensor:
        evaluator, generator = self._evaluator, self._evaluator.label_generator
        evaluator.seeds.seed_labels(generator, evaluator.counters.update_steps, self._forwards, micro_batch)
        return evaluator.workload.sample_labels(outputs, generator)

    def _combine_buffers(self, final: Sequence[Sequence[Tensor]]) -> None:
        """Set the buffers to the mean over the micro-batches of all ranks, in their order."""
        whole, packed = self._batch, self._evaluator.packed_buffers
        mine = [torch.stack(rows)[: 0 if whole.idle else None] for rows in zip(*final, strict=True)]
        # Counters (each advanced once from the same start) agree, so the largest is the one.
        means = [
            rows.mean(0) if rows.is_floating_point() else rows.amax(0)
            for rows in self._evaluator.ranks.in_order(mine, whole.shares)
        ]
        packed.write(packed.split(means))

    def _added_up(self, loss: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
        """The mean loss over all ranks; the gradients become those of it, in place."""
        ranks = self._evaluator.ranks
        own = Need.COMMUNICATION in self._needs
        if ranks.size > 1:
            loss = loss.clone()
            ranks.add_up([loss] if own else [loss, *gradients])
            if own:
                loss /= ranks.size
        if self.first_loss is None:
            self.first_loss = loss
        return loss

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


class _Packed:
    """A model's buffers, read and written in a few operations: a step does both for every micro-batch."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        # Through .data: BatchNorm saves its statistics for the backward pass without reading them, and a counted
        # in-place write would make autograd refuse a graph that is still in use.
        data = [buffer.data for buffer in buffers]
        self._by_dtype = [[b for b in data if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in data)]

    def read(self) -> list[Tensor]:
        """Copies, end to end: [elements] for each dtype."""
        return [torch.cat([buffer.reshape(-1) for buffer in same]) for same in self._by_dtype]

    def split(self, packed: Sequence[Tensor]) -> list[list[Tensor]]:
        """What `read` returned, shaped like the buffers, for `write`."""
        return [
            [piece.view(b.shape) for piece, b in zip(one.split([b.numel() for b in same]), same, strict=True)]
            for one, same in zip(packed, self._by_dtype, strict=True)
        ]

    def write(self, values: Sequence[Sequence[Tensor]]) -> None:
        for same, new in zip(self._by_dtype, values, strict=True):
            torch._foreach_copy_(same, list(new))


def _rows(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stacked; [0, ...] where there is none."""
    return torch.stack(list(values)) if values else like.detach().new_empty(0, *like.shape)
