"""Evaluation of a model on a split that is held back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from harness.interface.ranks import SINGLE_RANK, Ranks
from harness.interface.workload import Split, Workload
from harness.trial.liveness import show_progress


@torch.no_grad()
def evaluate(
    workload: Workload,
    model: nn.Module,
    forward_model: Any,
    split: Split,
    precision_context: Callable[[], AbstractContextManager[object]],
    ranks: Ranks = SINGLE_RANK,
) -> dict[str, float]:
    """The metrics of a model on a split, and `num_examples`; the model is left in training mode.

    forward_model: the model as it is to be called, for example compiled.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    # The ranks share the batches, each taking every size-th.
    for batch in workload.evaluation_batches(split, slice(ranks.rank, None, ranks.size)):
        with precision_context():
            outputs = workload.forward(forward_model, batch)
        for key, value in workload.evaluation_sums(outputs, batch).items():
            sums[key] = sums[key] + value if key in sums else value
        show_progress()
    # In the order of the ranks, on the host: every rank adds up the same numbers in the same order.
    total: dict[str, float] = {}
    for of_rank in ranks.all_gather({key: float(value) for key, value in sums.items()}):
        total |= {key: total.get(key, 0.0) + value for key, value in of_rank.items()}
    count = total.pop("num_examples")
    model.train()
    return {key: value / count for key, value in total.items()} | {"num_examples": int(count)}
