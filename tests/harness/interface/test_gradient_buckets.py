from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import gradient_buckets
from harness.interface.gradient_buckets import GradientBuckets


class Network:
    """Two ranks with the same gradients, whose sum is twice one's own; a message arrives when it is waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def all_reduce(self, message: Tensor, async_op: bool = False) -> Any:
        self.events.append(f"send {message.numel()}")
        network = self

        class Work:
            def wait(self) -> None:
                network.events.append(f"receive {message.numel()}")
                message.mul_(2)

        if async_op:
            return Work()
        message.mul_(2)
        return None


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(gradient_buckets.dist, "all_reduce", network.all_reduce)
    # Two layers of [4, 4] with their biases fit.
    monkeypatch.setattr(gradient_buckets, "BUCKET_BYTES", 4 * 40)
    return network


def backward(layers: nn.ModuleList, buckets: GradientBuckets | None, network: Network, skip: int | None = None) -> None:
    x = torch.ones(2, 4)
    for number, layer in enumerate(layers):
        if number != skip:
            x = torch.tanh(layer(x))
    for parameter in layers.parameters():
        parameter.grad = None
    if buckets is None:
        x.sum().backward()
        return
    with buckets.sending():
        x.sum().backward()
        network.events.append("backward ends")
    buckets.finish()


# From the last layers to the first, two in each bucket.
@pytest.mark.parametrize(
    ("skip", "sizes"), [(None, [40, 40, 40]), (0, [40, 40, 20]), (2, [40, 20, 40]), (5, [20, 40, 40])]
)
def test_gradients_are_sent_while_the_others_are_computed(network: Network, skip: int | None, sizes: list[int]) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    backward(layers, None, network, skip)
    expected = [None if p.grad is None else 2 * p.grad for p in layers.parameters()]
    # The hooks of the buckets do nothing in a pass that is not announced.
    buckets = GradientBuckets(list(layers.parameters()))
    backward(layers, None, network, skip)
    assert not network.events
    for _ in range(2):
        network.events.clear()
        backward(layers, buckets, network, skip)
        for parameter, value in zip(layers.parameters(), expected, strict=True):
            assert (parameter.grad is None) == (value is None)
            assert value is None or torch.equal(parameter.grad, value)
    before, after = (network.events[:i] for i in (network.events.index("backward ends"), None))
    # Each as soon as it is complete; all of them, since every pass before this one used the same parameters.
    assert before == [f"send {size}" for size in sizes]
    assert after[len(before) + 1 :] == [f"receive {size}" for size in sizes]


def test_a_parameter_that_was_not_used_before_is_summed_too(network: Network) -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    buckets = GradientBuckets(list(layers.parameters()))
    backward(layers, buckets, network, skip=1)
    backward(layers, None, network)
    expected = [2 * p.grad for p in layers.parameters()]
    backward(layers, buckets, network)
    assert all(torch.equal(p.grad, value) for p, value in zip(layers.parameters(), expected, strict=True))
