"""Hashes that are the same on every machine, in every process, for every version of Python."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def stable_hash(*parts: str | int) -> int:
    """A hash in [0, 2**63) of the parts, in their order."""
    # The types are part of the text, so that 1 and "1" differ; the separator keeps ("a", "b") and ("ab",) apart.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    # Shifted to 63 bits, since keys travel in int64 tensors.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def config_hash(value: Any) -> str:
    """The SHA-256 of `value` as JSON with sorted keys: 64 hexadecimal digits."""
    # default=str: configurations hold paths, which JSON does not know.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def short_hash(value: Any) -> str:
    """The first eight digits of `config_hash`, for folder names."""
    return config_hash(value)[:8]


def trial_seed(study_seed: int, trial: int) -> int:
    """The number in [0, 2**63) that all randomness of a trial comes from (`harness.seeding.TrialSeeds`)."""
    return stable_hash("pacemark", study_seed, trial)
