"""A submission that works when it is imported, before there is a clock."""

from __future__ import annotations

import time

from tests.cheats.cheats import Honest

_start = time.process_time()
while time.process_time() - _start < 1.5:
    pass


class TrainsAtImport(Honest):
    """Has used processor time already."""
