"""The tables of a leaderboard as CSV."""

from __future__ import annotations

import io

import pandas as pd


def format_csv(table: pd.DataFrame) -> str:
    """The table as CSV, in which no cell begins like a spreadsheet's formula."""
    text = io.StringIO()
    # Spreadsheets run a cell that begins like a formula, and names come from anyone's records.
    safe = table.copy()
    # Text is object in pandas 2 and string in pandas 3.
    for column in safe.select_dtypes(["object", "string"]):
        safe[column] = safe[column].map(lambda value: _not_a_formula(value) if isinstance(value, str) else value)
    safe.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def _not_a_formula(text: str) -> str:
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
