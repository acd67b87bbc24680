from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.interface import ExampleStream
from harness.seeding import TrialSeeds
from submissions.large_batch import LargeBatchAdamW, LargeBatchRMSprop, LargeBatchSGD
from tests.submissions.parity import assert_parity, make_setup, submission_optimizer


def test_the_linear_rule() -> None:
    assert_parity(
        submission_optimizer(LargeBatchSGD, needs=LargeBatchSGD.needs, lr=0.01, weight_decay=0.1, batch_factor=4),
        lambda p: torch.optim.SGD(p, lr=0.04, momentum=0.9, nesterov=True, weight_decay=0.1),
        torch.float64,
    )


def test_the_square_root_rule() -> None:
    hyperparameters = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1, "batch_factor": 4}
    assert_parity(
        submission_optimizer(LargeBatchAdamW, needs=LargeBatchAdamW.needs, **hyperparameters),
        lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.6, 0.96), eps=5e-5, weight_decay=0.2),
        torch.float64,
    )


def test_the_square_root_rule_of_rmsprop() -> None:
    """Weight decay is a part of RMSprop's gradient, and stays."""
    hyperparameters = {"lr": 0.01, "alpha": 0.99, "eps": 1e-4, "weight_decay": 0.1, "batch_factor": 4}
    assert_parity(
        submission_optimizer(LargeBatchRMSprop, needs=LargeBatchRMSprop.needs, **hyperparameters),
        lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.96, eps=5e-5, weight_decay=0.1),
        torch.float64,
    )


@pytest.mark.parametrize("cls", [LargeBatchSGD, LargeBatchAdamW, LargeBatchRMSprop])
def test_batches_are_larger(cls: type[Any]) -> None:
    setup = make_setup({"a": nn.Parameter(torch.ones(2))}, needs=cls.needs)
    assert len(cls(setup, batch_factor=3).select(ExampleStream(TrialSeeds(0, 1), 64)).indices) == 3


def test_betas_that_the_rule_cannot_scale_are_refused() -> None:
    with pytest.raises(ValueError, match=r"betas=\(0.5, 0.999\) with batch_factor=4: .* raise β or lower"):
        LargeBatchAdamW(make_setup({"a": nn.Parameter(torch.ones(2))}), betas=(0.5, 0.999), batch_factor=4)
