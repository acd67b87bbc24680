"""Numbers and intervals as text, the same in Markdown and LaTeX."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from harness.records.status import DISPLAY_ORDER

UNKNOWN = "–"
"""Stands for a number that is not known."""


def format_number(value: Any, digits: int) -> str:
    """With so many decimals; infinity as ∞, None or NaN as a dash."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"


def format_interval(row: pd.Series, name: str, digits: int) -> str:
    """`0.912 (0.871 to 0.950)` from the columns name, name_low, name_high; the number alone where there is no
    interval."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(low) or math.isnan(high):
        return format_number(value, digits)
    return f"{format_number(value, digits)} ({format_number(low, digits)} to {format_number(high, digits)})"


def format_ranks(row: pd.Series) -> str:
    """`1 to 3`, or `1`, from the columns rank_low and rank_high; a dash without ranks."""
    low, high = row["rank_low"], row["rank_high"]
    if math.isnan(low):
        return UNKNOWN
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def format_speedup(row: pd.Series) -> str:
    """`1.34 (1.20 to 1.50)`, or `at most 1.34` where targets were missed; a dash without a baseline."""
    # Before the check for NaN, as such a speed-up is NaN too.
    reading = row["speedup_reading"]
    if reading == "none":
        return "no number: each missed what the other met, or nothing is shared"
    if not isinstance(reading, str) or math.isnan(row["speedup"]):
        return UNKNOWN
    if reading == "exact":
        return format_interval(row, "speedup", 2)
    return f"{'at most' if reading == 'upper bound' else 'at least'} {format_number(row['speedup'], 2)}"


def format_bytes(value: float) -> str:
    """`12 MiB`; a dash for NaN."""
    return UNKNOWN if math.isnan(value) else f"{value / 2**20:,.0f} MiB"


def format_percent(value: float) -> str:
    """A share, 0.123, as `12.3%`; a dash for NaN."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:.1f}%"


def format_statuses(row: pd.Series) -> str:
    """`40 reached, 5 exhausted, 2 disturbed`."""
    counts = [f"{row[status]} {status.replace('_', ' ')}" for status in DISPLAY_ORDER if row.get(status)]
    return ", ".join(counts + ([f"{row['disturbed']} disturbed"] if row["disturbed"] else []))
