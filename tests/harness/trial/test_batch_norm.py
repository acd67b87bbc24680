from __future__ import annotations

import torch
from torch import nn

from harness.interface.data_order import Selection
from harness.trial.batch_norm import batch_norm_statistics, recompute_statistics
from tests.harness.problem import Net, make


def selections(*starts: int, size: int = 16) -> list[Selection]:
    return [Selection(torch.arange(s, s + size), torch.arange(s, s + size)) for s in starts]


def test_statistics_are_means_over_micro_batches_of_the_present_weights() -> None:
    evaluator, _ = make(micro_batch=4)
    norm = evaluator.model.norm
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    before = norm.running_var.clone()
    recompute_statistics(evaluator, selections(0, 16))
    inputs = evaluator.workload.batch(torch.arange(32), torch.arange(32))["inputs"]
    pieces = evaluator.model.first(inputs).detach().split(4)  # type: ignore[operator]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in pieces]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in pieces]).mean(0))
    assert not torch.equal(norm.running_var, before)
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 0 and evaluator.model.training
    assert evaluator.counters.forward_examples == 32 and evaluator.counters.backward_examples == 0


def test_a_model_without_batch_norm_costs_nothing() -> None:
    evaluator, _ = make(model=Net(norm=False))
    recompute_statistics(evaluator, selections(0))
    assert batch_norm_statistics(evaluator.model) == [] and evaluator.counters.forward_examples == 0
