"""Seconds per step of a timing run against those of the trials."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness.scoring.timings import Timings

SECONDS_PER_STEP = {"a": 0.1, "b": 0.2, "c": 0.3}


def timings() -> Timings:
    rows = [
        {"machine": "m", "workload": "lm", "submission": name, "round": number, "steps": 10, "seconds": 10 * seconds,
         "build_seconds": 1.0, "compile_seconds": 0.0}
        for name, seconds in SECONDS_PER_STEP.items() for number in (1, 2, 3)
    ]  # fmt: skip
    return Timings.from_rows(pd.DataFrame(rows))


def trials(machine: float = 1.0, **factors: float) -> pd.DataFrame:
    """Two trials of each submission, the second disturbed. machine: how much slower it is than that of the timing run.
    factors: how much longer a step of a submission takes than there."""
    rows = [
        {"submission": name, "workload": "lm", "limit_steps": 100, "build_seconds": 1.0, "compile_seconds": np.nan,
         "limit_seconds": 1 + 100 * seconds * machine * factors.get(name, 1.0) * disturbance}
        for name, seconds in SECONDS_PER_STEP.items() for disturbance in (1, 7)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("machine", [0.2, 1.0, 9.0])
def test_another_machine_is_no_doubt(machine: float) -> None:
    assert not timings().doubts(trials(machine, a=1.5, b=0.8))


@pytest.mark.parametrize(("name", "factor"), [("a", 2.5), ("c", 0.3)])
def test_a_submission_that_does_less_while_it_is_timed_is_named(name: str, factor: float) -> None:
    (sentence,) = timings().doubts(trials(4.0, **{name: factor}))
    assert sentence.startswith(f"A step of {name} on lm takes {factor:.2g} times as long in its trials")


def test_of_two_the_slower_is_named_and_one_alone_never() -> None:
    both = trials(a=3.0)
    (sentence,) = timings().doubts(both[both["submission"] != "c"])
    assert sentence.startswith("A step of a on lm takes 3 times as long")
    assert not timings().doubts(both[both["submission"] == "a"])
