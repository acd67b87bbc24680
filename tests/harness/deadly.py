"""A submission whose module ends the process that loads it, by the signal or with the status PACEMARK_TEST_DEATH, as
often as the folder PACEMARK_TEST_DEATHS has files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.harness.seams import _Sgd

for path in sorted(Path(os.environ.get("PACEMARK_TEST_DEATHS", "/nonexistent")).glob("*")):
    path.unlink()
    death = os.environ["PACEMARK_TEST_DEATH"]
    if death.isdecimal():
        os._exit(int(death))
    os.kill(os.getpid(), signal.Signals[death])


class Deadly(_Sgd):
    """SGD, where it comes so far."""
