"""The console of a command: lines that can be copied whole."""

from __future__ import annotations

from typing import Any

from rich.console import Console

_WIDTH_OF_A_FILE = 10_000
"""Columns where the output is no terminal: no table is ever so wide, so none is folded."""


def make_console(**options: Any) -> Console:
    """A console that breaks no line of text: a terminal wraps long ones itself, so that a path can be copied, and a
    file or a pipe gets them whole, tables included. options: of `rich.console.Console`."""
    console = Console(highlight=False, soft_wrap=True, **options)
    if not console.is_terminal:
        # rich takes 80 columns there.
        console.width = _WIDTH_OF_A_FILE
    return console
