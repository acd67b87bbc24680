"""What all commands share: exit statuses, messages and the level of the log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from harness.errors import UserError
from harness.log import take_verbosity


def run_script(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run the `main` of a script with its arguments and return its exit status: 2 with one line per problem after a
    UserError or where a file cannot be read or written, 130 after Ctrl-C.

    -v and -vv are taken from the arguments (see `harness.log`).
    """
    try:
        return main(take_verbosity(arguments))
    except UserError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain again when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A file or folder that an option names: the text has its path and what is wrong with it.
        print(f"error: {error}; give another path, or make room there", file=sys.stderr)
        return 2


def printable(line: str) -> str:
    """A line for a terminal: text of records can hold anything that one obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
