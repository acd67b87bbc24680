"""What happens behind the display, through `logging`: quiet unless -v or PACEMARK_LOG asks for it.

Every module logs to `logging.getLogger(__name__)`. A command shows these records on standard error; the process of a
trial sends them to its parent, which shows them as its own. Nothing is logged while a training clock runs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

VARIABLE = "PACEMARK_LOG"
"""The environment variable with the level. Processes of trials, SLURM jobs and Ray tasks inherit it."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
PACKAGES = (__name__.partition(".")[0], "workloads", "submissions", "scripts")
"""Packages whose records are shown; other libraries keep their own handling."""

_MARK = "pacemark-log: "
"""Begins a line of a child's standard error that is a log record."""


def take_verbosity(arguments: list[str]) -> list[str]:
    """Start logging at the level that -v (INFO), -vv (DEBUG) or else PACEMARK_LOG asks for; the other arguments.

    The level is put into the environment, for the processes that this one starts. Raises UserError for a wrong level.
    """
    flags = [argument for argument in arguments if re.fullmatch(r"-v+|--verbose", argument)]
    if flags:
        count = sum(1 if flag == "--verbose" else len(flag) - 1 for flag in flags)
        os.environ[VARIABLE] = "INFO" if count == 1 else "DEBUG"
    configure()
    return [argument for argument in arguments if argument not in flags]


def configure() -> None:
    """Show the log records of this process on standard error, from the level of PACEMARK_LOG on (default: WARNING).
    Raises UserError for a wrong level."""
    _attach(_display)


def send_to_parent() -> None:
    """In the process of a trial: write records so that the parent can tell them from errors (see `receive`)."""
    _attach(_ToParent())


def receive(line: str, trial: str) -> bool:
    """Log again what a child logged, if `line` of its standard error is a log record; whether it is one.

    trial: its name, which the record is prefixed with.
    """
    if not line.startswith(_MARK):
        return False
    try:
        content: dict[str, Any] = json.loads(line.removeprefix(_MARK))
        logger, level = logging.getLogger(content["name"]), int(content["level"])
        logger.log(level, "%s: %s", trial, content["message"])
    # Two threads of a child can write into each other's lines.
    except (ValueError, KeyError, TypeError):
        return False
    return True


def show_above(console: Console | None) -> None:
    """Show records above the live display of `console` from now on, if both are on the same terminal; None: no more."""
    _display.live_console = console


def is_shown(level: int) -> bool:
    """Whether records of a level, such as logging.INFO, are shown."""
    return logging.getLogger(PACKAGES[0]).isEnabledFor(level)


def _level() -> int:
    name = os.environ.get(VARIABLE) or "WARNING"
    if name.upper() not in LEVELS:
        raise UserError(f"{VARIABLE}={name}: no such level; {did_you_mean(name.upper(), LEVELS)}")
    # Every rank of a launcher does the same, so one of them tells it; each reports its own troubles.
    is_main = os.environ.get("RANK", "0") == "0"
    level: int = getattr(logging, name.upper())
    return level if is_main else max(level, logging.WARNING)


def _attach(handler: logging.Handler) -> None:
    level = _level()
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        # A command can be called several times in a process.
        for former in [h for h in logger.handlers if isinstance(h, _Display | _ToParent)]:
            logger.removeHandler(former)
        logger.addHandler(handler)


class _Display(logging.Handler):
    """Standard error: through rich on a terminal, so that a live display stays whole; whole lines elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.live_console: Console | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._on_terminal: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.emit`."""
        try:
            # Looked up at every record, since tests and live displays replace it.
            if sys.stderr.isatty():
                self._terminal().emit(record)
            else:
                sys.stderr.write(self.format(record) + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def _terminal(self) -> logging.Handler:
        # rich is imported at the first record: a quiet command need not wait for it.
        from rich.logging import RichHandler
        from rich.text import Text

        from harness.display import make_console

        class Lines(RichHandler):
            """A record as one line, which the terminal wraps itself: rich's own columns would break its paths."""

            def render(self, *, record: logging.LogRecord, **_: Any) -> Text:
                """As `RichHandler.render`."""
                clock = (time.strftime("%H:%M:%S ", time.localtime(record.created)), "log.time")
                return Text.assemble(clock, self.get_level_text(record), self.format(record))

        if self._on_terminal is None:
            self._on_terminal = Lines()
            self._on_terminal.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        assert isinstance(self._on_terminal, RichHandler)
        self._on_terminal.console = self.live_console or make_console(stderr=True)
        return self._on_terminal


class _ToParent(logging.Handler):
    """Standard error of a child: a line for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.emit`."""
        try:
            message = self.format(record)
            content = {"name": record.name, "level": record.levelno, "message": message}
            # In one call, so that no line of another thread comes between.
            sys.stderr.write(f"{_MARK}{json.dumps(content)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_display = _Display()
