"""Errors that a user can mend: collected, so that all are reported at once."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input: each problem names the key, the value and the remedy. The command ends with status 2."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for a close name, else the choices."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known are {', '.join(known)}" if known else "there are none"


def reporting(main: Callable[[], int]) -> int:
    """Run a script's `main`; a UserError ends it with one clear message and status 2, an interruption with 130."""
    try:
        return main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
