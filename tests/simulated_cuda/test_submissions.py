from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness.config.choices import TEMPLATES, list_choices
from harness.config.compose import load_run
from harness.config.declared_needs import host_waits
from tests.simulated_cuda.program import STEPS

pytestmark = pytest.mark.xdist_group("simulated_cuda")
Measure = Callable[..., dict[str, dict[str, Any]]]
NAMES = [name for name in list_choices("optimizer") if name not in TEMPLATES]
MORE_THAN_ONE_A_STEP = {"powersgd"}
"""torch's hook waits at every matrix."""


# In parts, each within the time limit of a test.
@pytest.mark.parametrize("names", [NAMES[i::3] for i in range(3)], ids=range(3))
def test_no_step_of_a_submission_makes_the_host_wait_unless_it_says_so(
    simulated_cuda: Measure, names: list[str]
) -> None:
    results = simulated_cuda("submissions", *names)
    assert list(results) == names
    errors = {name: result["error"] for name, result in results.items() if result["error"]}
    assert not errors
    undeclared = {}
    for name, result in results.items():
        if name in MORE_THAN_ONE_A_STEP or not (result["before"] or result["after"]):
            continue
        # Nothing is imported where there is nothing to excuse.
        declared = " ".join(host_waits(load_run(["workload=gpt2", f"optimizer={name}"])))
        for phase in ("before", "after"):
            # torch's decompositions wait at every call, one for matrices of one shape.
            decompositions = sum(count for place, count in result[phase].items() if "_linalg_" in place)
            others = sum(result[phase].values()) - decompositions
            excused = "decomposition" in declared or "singular" in declared
            if others > (STEPS if declared else 0) or (decompositions and not excused):
                undeclared[name] = result[phase]
    assert not undeclared
    # The measurement sees the waits of a method that decides on the host by its nature.
    if "swats" in names:
        assert sum(results["swats"]["before"].values()) == sum(results["swats"]["after"].values()) == STEPS
