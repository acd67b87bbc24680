"""Hashes that are the same on every machine, in every process, for every version of Python."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def stable_hash(*parts: str | int) -> int:
    """A hash in [0, 2**63) of the parts, in their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def config_hash(value: Any) -> str:
    """The SHA-256 of `value` as JSON with sorted keys: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def short_hash(value: Any) -> str:
    """The first eight digits of `config_hash`, for folder names."""
    return config_hash(value)[:8]
