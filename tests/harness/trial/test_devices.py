from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.compose import load_run
from harness.interface.submission import collect_tensors
from harness.records.status import Status
from harness.trial.devices import device_types, restore_devices
from harness.trial.record import Record
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2


class Observer:
    """Interrupts the trial after its first checkpoint; in a trial that is resumed, counts which of `tensors` live."""

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors, self.alive = tensors, -1

    def begin(self, record: Any, first_step: float) -> None:
        self.is_resumed = first_step > 0

    def evaluation(self, row: Any) -> None:
        if row["global_step"] == 6 and not self.is_resumed:
            raise KeyboardInterrupt
        gc.collect()
        self.alive = sum(tensor() is not None for tensor in self.tensors)

    def end(self, record: Any) -> None:
        """Nothing is shown."""


def test_a_resumed_trial_lets_go_of_the_weights_in_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run([*TINY_GPT2, "optimizer=adamw", "checkpoint_seconds=0", f"records={tmp_path}"])
    tensors: list[Any] = []
    load_checkpoint = Record.load_checkpoint

    def watched(record: Record) -> Any:
        checkpoint = load_checkpoint(record)
        if checkpoint is not None:
            tensors.extend(weakref.ref(tensor) for tensor in collect_tensors(checkpoint["training"]["model"]))
        return checkpoint

    monkeypatch.setattr(Record, "load_checkpoint", watched)
    run_trial(run, lambda: [Observer(tensors)])
    observer = Observer(tensors)
    record, _ = run_trial(run, lambda: [observer])
    assert record.status is Status.EXHAUSTED and record.preemption_count == 1
    assert len(tensors) > 10 and observer.alive == 0


def test_tensors_come_back_to_the_device_on_which_they_were() -> None:
    meta = torch.device("meta")
    state = {"step": torch.tensor(3.0), "moments": [torch.ones(2, device=meta), {"scale": (torch.ones(()), 1.5)}]}
    types = device_types(state)
    assert types == ["cpu", "meta", "cpu"]
    loaded = {"step": torch.tensor(3.0), "moments": [torch.ones(2), {"scale": (torch.ones(()), 1.5)}]}
    restored = restore_devices(loaded, types, meta)
    assert restored["step"].device.type == "cpu" and restored["moments"][0].device == meta
    assert restored["moments"][1]["scale"][1] == 1.5 and restored["moments"][1]["scale"][0].device.type == "cpu"
