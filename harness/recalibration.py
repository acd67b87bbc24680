"""BatchNorm statistics of weights that were never trained with, such as averages: taken anew from training examples.

Each statistic becomes the mean over the micro-batches of what a forward pass in training mode measures there (Izmailov
et al. 2018, arXiv:1803.05407, section 3.2, on some batches instead of all).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.seeding import Selection
from harness.step import Evaluator


def statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the BatchNorm layers that keep them."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    found = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
    return [tensor for tensor in found if tensor is not None]


@torch.no_grad()
def recalibrate(evaluator: Evaluator, selections: Iterable[Selection]) -> None:
    """Set the statistics of the model to those of its present weights on the examples of `selections`, one forward
    each. Other buffers stay as they are; nothing is done where there are no statistics."""
    model = evaluator.model
    own = statistics(model)
    if not own:
        return
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    before = [buffer.clone() for buffer in evaluator.buffers]
    means: list[list[Tensor]] = []
    try:
        for layer in layers:
            layer.momentum = 1.0  # a forward pass then leaves what it measured
        for selection in selections:
            batch = evaluator.fetch(selection)
            measured: list[list[Tensor]] = [[] for _ in own]
            for k, micro_batch in batch.micro_batches.items():
                evaluator.seeds.seed_model_randomness(evaluator.counters.update_steps, k)
                with evaluator.precision_context():
                    evaluator.workload.forward(model, micro_batch)
                for values, tensor in zip(measured, own, strict=True):
                    values.append(tensor.clone())
            rows = [
                torch.stack(values) if not batch.idle else tensor.new_empty(0, *tensor.shape)
                for values, tensor in zip(measured, own, strict=True)
            ]
            means.append([one.mean(0) for one in evaluator.ranks.in_order(rows, batch.shares)])
            evaluator.counters.forward_examples += batch.size
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        torch._foreach_copy_(evaluator.buffers, before)
    torch._foreach_copy_(own, [torch.stack(list(values)).mean(0) for values in zip(*means, strict=True)])
