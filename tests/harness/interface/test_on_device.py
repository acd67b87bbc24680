from __future__ import annotations

import pytest
import torch

from harness.interface import sample_classes, to_device


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_classes_are_drawn_as_multinomial_draws_them_to_the_bit(classes: int) -> None:
    probabilities = torch.randn(500, classes, generator=torch.Generator().manual_seed(0)).softmax(-1)
    probabilities[:, 0] = 0
    drawn = sample_classes(probabilities, torch.Generator().manual_seed(3))
    assert torch.equal(
        drawn, torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    )
    assert (drawn > 0).all()


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
