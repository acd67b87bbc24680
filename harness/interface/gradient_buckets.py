"""Summing gradients over the ranks while the backward pass still computes the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""About how much one message carries: fewer and larger messages overlap less, smaller ones cost more latencies. The
size that torch's DistributedDataParallel takes by default."""


@dataclass
class _Bucket:
    """Parameters whose gradients go into one message."""

    parameters: list[nn.Parameter]
    used: list[bool]
    """Whether the loss depends on each, as the passes before this one have shown."""
    pending: int = 0
    """Gradients that this pass has still to compute before the message can be sent."""
    sent: list[Tensor] = field(default_factory=list)
    """The gradients that are in the message."""
    message: Tensor | None = None
    """Their values end to end, [elements]."""
    work: Any = None


class GradientBuckets:
    """The gradients of a model in messages of fixed content and order, each sent as soon as it is complete.

    Every rank must make the same passes, in which the loss depends on the same parameters. Which parameters are in a
    message does not depend on timing, so that the sums are the same in every run.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._is_sending = False
        self._next = 0
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        # From the last to the first: about the order in which the backward pass computes them.
        for parameter in reversed(parameters):
            size = parameter.numel() * parameter.element_size()
            last = self._buckets[-1] if self._buckets else None
            fits = last is not None and last.parameters[0].dtype == parameter.dtype
            if last is None or not fits or _bytes_of(last.parameters) + size > BUCKET_BYTES:
                last = _Bucket([], [])
                self._buckets.append(last)
            last.parameters.append(parameter)
            last.used.append(True)
            self._bucket_of[parameter] = last
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Within it a backward pass completes the gradients in ``.grad``, and each full bucket is sent at once."""
        self._next, self._is_sending = 0, True
        for bucket in self._buckets:
            bucket.pending, bucket.sent, bucket.message, bucket.work = sum(bucket.used), [], None, None
        try:
            yield
        finally:
            self._is_sending = False

    def finish(self) -> None:
        """Send what is left, wait for all messages, and put the sums over the ranks into ``.grad``."""
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        late: list[Tensor] = []
        for bucket in self._buckets:
            gradients = [parameter.grad for parameter in bucket.parameters]
            bucket.used = [gradient is not None for gradient in gradients]
            in_message = {id(gradient) for gradient in bucket.sent}
            # A parameter on which the loss of no earlier pass depended.
            late += [gradient for gradient in gradients if gradient is not None and id(gradient) not in in_message]
            if bucket.message is not None:
                bucket.work.wait()
                sizes = [gradient.numel() for gradient in bucket.sent]
                sums = [p.view_as(g) for p, g in zip(bucket.message.split(sizes), bucket.sent, strict=True)]
                torch._foreach_copy_(bucket.sent, sums)
            bucket.sent, bucket.message, bucket.work = [], None, None
        for gradient in late:
            dist.all_reduce(gradient)

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._is_sending:
            return
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].pending -= 1
        # In their order on every rank: a collective of one rank meets the same one of the others.
        while self._next < len(self._buckets) and self._buckets[self._next].pending <= 0:
            self._send(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        bucket.sent = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        if bucket.sent:
            bucket.message = torch.cat([gradient.reshape(-1) for gradient in bucket.sent])
            bucket.work = dist.all_reduce(bucket.message, async_op=True)


def _bytes_of(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
