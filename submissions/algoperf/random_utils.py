"""The names of AlgoPerf's `random_utils` that submissions use: keys of random numbers, as pairs of 32-bit numbers."""

from __future__ import annotations

from collections.abc import Sequence

from harness.hashing import stable_hash

Key = list[int]
"""Two numbers in [0, 2**32)."""


def PRNGKey(seed: int) -> Key:
    """The key of a seed."""
    return _key("seed", seed)


def fold_in(seed: Sequence[int], data: int) -> Key:
    """Another key for each number `data`."""
    return _key("fold", *seed, data)


def split(seed: Sequence[int], num: int = 2) -> list[Key]:
    """`num` keys made of one."""
    return [_key("split", *seed, number) for number in range(num)]


def _key(purpose: str, *numbers: int) -> Key:
    value = stable_hash(purpose, *map(int, numbers))
    return [value >> 32 & 0xFFFFFFFF, value & 0xFFFFFFFF]
