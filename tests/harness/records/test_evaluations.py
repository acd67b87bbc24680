"""How evaluations.py reads; what it makes of real files is tested in tests/harness/scoring/test_load_records.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes
from tests.harness.folders import curve

COUNT_THREADS = """
import os, sys
from pathlib import Path
from harness.records.evaluations import read_evaluations
before = set(os.listdir("/proc/self/task"))
assert len(read_evaluations(Path(sys.argv[1]), "validation/loss").steps) == 3
print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_reading_a_trial_starts_no_thread_that_could_abort_the_process_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "eval_measurements.csv"
    path.write_text(curve([3.0, 2.0, 1.0]))
    done = processes.run([sys.executable, "-c", COUNT_THREADS, str(path)], cwd=processes.ROOT)
    assert (done.stdout, done.stderr) == ("0\n", "")
