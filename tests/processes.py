"""Processes and threads of the tests: nothing is waited for without a deadline."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.command_line import run_script

ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 100.0
"""Below the time limit of a test, so that the message is that of the wait which failed."""


def python(script: str, *arguments: str) -> list[str]:
    """The command line of a script of the repository, e.g. `python("run.py", "--help")`."""
    return [sys.executable, str(ROOT / script), *arguments]


def call(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What a script prints and its exit status, from its `main` in this process: a process of its own would load torch
    and pandas anew. Tests that are about processes use `run`."""
    main = importlib.import_module(f"scripts.{script}").main
    # argparse names the program by it.
    former, sys.argv[0] = sys.argv[0], f"{script}.py"
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            status = run_script(main, [str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            sys.argv[0] = former
    return subprocess.CompletedProcess([script, *map(str, arguments)], status, output.getvalue(), errors.getvalue())


def execute(code: str) -> str:
    """What `python -c CODE` prints, executed in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {"__name__": "__main__"})
    return output.getvalue()


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end and capture its output as text."""
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, **options)


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for `condition`. Fails where `alive` ends to hold first, or the deadline passes."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert alive(), "what should bring the condition about is over"
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS:g} s"
        time.sleep(0.01)


def is_running(process: Any) -> Callable[[], bool]:
    """Whether `process`, a Popen or a `forked.ForkedProcess`, has not ended; for `wait_until`."""
    return lambda: process.poll() is None


def join(*threads: threading.Thread) -> None:
    """Wait for the end of `threads`."""
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive(), f"not over within {DEADLINE_SECONDS:g} s"
