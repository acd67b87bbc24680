"""How two configurations differ, in words."""

from __future__ import annotations

from typing import Any


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """A line for each key of nested mappings whose value differs: `optimizer.clip_norm: 1.0 there, 0.5 now`.

    An absent key counts as None. prefix: the path of keys to the two values.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if before == after else [f"{prefix}: {before} there, {after} now"]
