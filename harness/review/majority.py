"""What most of several records have, where they should all have the same."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

ENOUGH = Fraction(2, 3)
"""Share of the records above which, or at which, what they have is what the others should have had. With less than that
nobody can say who is in the minority."""


def freeze(value: Any) -> str:
    """Any value of a JSON file as a text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def majority(values: Iterable[str]) -> str | None:
    """The value that enough of the records have; None if no value is."""
    counts = Counter(values)
    if not counts:
        return None
    value, count = counts.most_common(1)[0]
    return value if count >= ENOUGH * counts.total() else None


def describe(values: Iterable[str], holders: Iterable[str]) -> str:
    """The values with their counts, and who has them where that is short: `"bf16": 15 of adamw, muon; ...`."""
    by_value: dict[str, list[str]] = defaultdict(list)
    for value, holder in zip(values, holders, strict=True):
        by_value[value].append(holder)
    parts = []
    for value, names in sorted(by_value.items()):
        distinct = sorted(set(names))
        listed = ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")
        parts.append(f"{value[:80]}: {len(names)} of {listed}")
    return "; ".join(parts)
