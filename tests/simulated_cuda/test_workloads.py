from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from harness.trial.record import Record
from tests.conftest import TINY_GPT2, TINY_RESNET, TINY_VIT

pytestmark = pytest.mark.xdist_group("simulated_cuda")
Measure = Callable[..., dict[str, dict[str, Any]]]
TRIALS = {
    "gpt2": [*TINY_GPT2, "optimizer=adamw"],
    "gpt2 resumed with state on the host": [*TINY_GPT2, "optimizer=nadamw"],
    "gpt2 in bf16": [*TINY_GPT2, "optimizer=adamw", "precision=bf16"],
    "resnet": [*TINY_RESNET, "optimizer=sgd", "workload.nominal_batch=32", "workload.max_steps=6"],
    "vit": [*TINY_VIT, "optimizer=adamw"],
}


def quality(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What a device must not change: losses, metrics and counts."""
    keys = ("global_step", "train/loss", "forward_examples", "backward_examples")
    return [
        tuple(
            float(row[key])
            for key in row
            if key in keys or (key.startswith(("validation/", "test/")) and row[key] != "")
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def results(simulated_cuda: Measure, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("simulated")
    file = folder / "trials.json"
    file.write_text(json.dumps({name: [*trial, f"records={folder / name}"] for name, trial in TRIALS.items()}))
    return simulated_cuda("trials", str(file))


@pytest.mark.parametrize("name", TRIALS)
def test_no_step_makes_the_host_wait_before_and_after_a_resume(results: dict[str, dict[str, Any]], name: str) -> None:
    whole, cut = results[name]["whole"], results[name]["cut"]
    assert whole["status"] == cut["status"] == "exhausted", whole["traceback"] or cut["traceback"]
    assert whole["waits"] == cut["waits"] == {}
    assert cut["rows"][-1]["preemption_count"] == 1
    assert quality(cut["rows"]) == quality(whole["rows"])


def test_a_trial_on_the_device_has_the_results_of_the_cpu(
    results: dict[str, dict[str, Any]], trial: Callable[..., Record]
) -> None:
    expected = trial(base=TRIALS["resnet"], optimizer="sgd")
    assert quality(results["resnet"]["whole"]["rows"]) == quality(expected.rows)


def test_memory_is_told_apart(results: dict[str, dict[str, Any]]) -> None:
    last = results["resnet"]["whole"]["rows"][-1]
    # 58,000 + 2,000 + 10,000 images in float32, the first padded to 32 x 32, and labels.
    assert last["data_memory_bytes"] >= 4 * (58_000 * 32 * 32 + 12_000 * 28 * 28)
    # The data are in neither of the others; one evaluation batch is larger than a training batch.
    assert 0 < last["peak_memory_bytes"] < last["evaluation_memory_bytes"] < last["data_memory_bytes"]
    # A resume keeps the peak of the steps before it, and the checkpoint is no second copy on the device.
    # abs: a sum of losses more or less is a few bytes.
    for name in TRIALS:
        whole, cut = (results[name][kind]["rows"][-1] for kind in ("whole", "cut"))
        assert cut["peak_memory_bytes"] == pytest.approx(whole["peak_memory_bytes"], abs=64), name
