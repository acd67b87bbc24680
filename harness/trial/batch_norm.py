"""BatchNorm statistics of weights that were never trained with, such as averages: recomputed from training examples.

Each statistic becomes the mean over the micro-batches of what a forward pass in training mode measures there (Izmailov
et al. 2018, arXiv:1803.05407, section 3.2, on some batches instead of all).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.interface.data_order import Selection
from harness.interface.model_runner import ModelRunner, StepBatch
from harness.trial.liveness import show_progress


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of the BatchNorm layers that keep them."""
    tensors = [tensor for layer in _batch_norms(model) for tensor in (layer.running_mean, layer.running_var)]
    return [tensor for tensor in tensors if tensor is not None]


@torch.no_grad()
def recompute_statistics(runner: ModelRunner, selections: Iterable[Selection]) -> None:
    """Set the BatchNorm statistics to those of the model's present weights on the examples of `selections`, one forward
    each. Other buffers stay as they are; a model without such statistics is left alone.

    The model must be in training mode. Every rank must call it with the same selections.
    """
    statistics = batch_norm_statistics(runner.model)
    if not statistics:
        return
    # Forward passes also move the other buffers, for example the number of batches tracked.
    buffers_before = [buffer.clone() for buffer in runner.buffers]
    means_of_steps: list[list[Tensor]] = []
    try:
        with _keep_last_measurement(runner.model):
            for selection in selections:
                means_of_steps.append(_measure(runner, runner.load_batch(selection), statistics))
                show_progress()
    finally:
        torch._foreach_copy_(runner.buffers, buffers_before)
    torch._foreach_copy_(
        statistics, [torch.stack(list(values)).mean(0) for values in zip(*means_of_steps, strict=True)]
    )


def _measure(runner: ModelRunner, batch: StepBatch, statistics: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each statistic over the micro-batches of a step, of all ranks."""
    measured: list[list[Tensor]] = [[] for _ in statistics]
    for number, micro_batch in batch.micro_batches.items():
        runner.seeds.seed_model_randomness(runner.counters.update_steps, number)
        with runner.precision_context():
            # Not the compiled model: a changed momentum could make it compile again, on the clock.
            runner.workload.forward(runner.model, micro_batch)
        for values, tensor in zip(measured, statistics, strict=True):
            values.append(tensor.clone())
    rows = [
        # An idle rank sends no row: micro-batch 0 comes from the rank that it belongs to.
        torch.stack(values) if not batch.idle else tensor.new_empty(0, *tensor.shape)
        for values, tensor in zip(measured, statistics, strict=True)
    ]
    runner.counters.forward_examples += batch.size
    return [values.mean(0) for values in runner.ranks.all_gather_rows(rows, batch.shares)]


@contextmanager
def _keep_last_measurement(model: nn.Module) -> Iterator[None]:
    """Within it the running statistics after a forward pass are those of that pass alone."""
    layers = _batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        # With momentum 1 the running value is replaced by the measured one.
        layer.momentum = 1.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
