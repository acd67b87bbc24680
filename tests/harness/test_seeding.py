from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.hashing import stable_hash
from harness.interface.data_order import ExampleStream
from harness.seeding import TrialSeeds, _mix, splitmix64


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 50), st.integers(0, 5))
def test_the_stream_does_not_depend_on_how_it_is_cut(cuts: list[int], size: int, seed: int) -> None:
    pieces = ExampleStream(TrialSeeds(seed, 1), size)
    pieces_taken = [pieces.take(cut) for cut in cuts]
    all_at_once = ExampleStream(TrialSeeds(seed, 1), size).take(sum(cuts))
    assert torch.equal(torch.cat([piece.indices for piece in pieces_taken]), all_at_once.indices)
    assert torch.equal(torch.cat([piece.keys for piece in pieces_taken]), all_at_once.keys)
    assert pieces.position == sum(cuts)


@given(st.integers(1, 60), st.integers(0, 3))
def test_every_epoch_holds_every_example_once(size: int, epoch: int) -> None:
    stream = ExampleStream(TrialSeeds(7, 2), size)
    indices = stream.peek(epoch * size, size).indices
    assert sorted(indices.tolist()) == list(range(size))


def test_epochs_seeds_and_trials_differ() -> None:
    def first(seed: int, trial: int, epoch: int = 0) -> list[int]:
        return ExampleStream(TrialSeeds(seed, trial), 100).peek(100 * epoch, 100).indices.tolist()

    orders = [first(0, 1), first(1, 1), first(0, 2), first(0, 1, epoch=1)]
    assert len({tuple(order) for order in orders}) == 4


def test_keys_are_63_bit_and_unbiased() -> None:
    keys = ExampleStream(TrialSeeds(0, 1), 10).peek(0, 20_000).keys
    assert keys.min() >= 0
    assert len(keys.unique()) == len(keys)
    for bit in (0, 16, 32, 62):
        assert abs((keys >> bit & 1).double().mean() - 0.5) < 0.02


def test_splitmix64_matches_the_published_sequence() -> None:
    # First outputs of the reference generator seeded with 1234567 (Vigna's splitmix64.c).
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * golden
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "from harness.seeding import stable_hash; print(stable_hash('a', 1, 'b'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == stable_hash("a", 1, "b")
    assert stable_hash("a", 1) != stable_hash("a", "1")


def test_dropout_masks_depend_on_step_and_micro_batch_only() -> None:
    seeds = TrialSeeds(0, 1)

    def mask(step: int, micro_batch: int) -> list[float]:
        seeds.seed_model_randomness(step, micro_batch)
        return torch.rand(8).tolist()

    assert mask(3, 1) == mask(3, 1)
    assert len({tuple(mask(step, k)) for step in range(3) for k in range(3)}) == 9


@given(st.integers(0, 2**64 - 1))
def test_a_single_number_is_mixed_as_an_array_is(x: int) -> None:
    assert _mix(x) == int(splitmix64(np.array([x], dtype=np.uint64))[0])


def test_an_order_is_drawn_once_however_the_end_of_an_epoch_and_what_follows_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: drawn.append(n) or randperm(n, **options))
    stream = ExampleStream(TrialSeeds(0, 1), 20)
    # A batch at the end of each epoch, in turn with the two that are read ahead.
    for position in range(0, 60, 4):
        for ahead in (0, 4, 8):
            stream.peek(position + ahead, 4)
    assert len(drawn) == 4
