"""Two pools of one machine keep cores and GPUs apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.compose import load_run
from harness.study import executors
from harness.study.reservations import Reservation
from harness.study.trial_process import Slot
from tests.conftest import TINY_GPT2

RUN = [*TINY_GPT2, "optimizer=adamw"]


def test_what_one_has_the_other_does_not_get(tmp_path: Path) -> None:
    first, second = Reservation(tmp_path), Reservation(tmp_path)
    assert first.take("core", ["0", "1", "2"], 2) == ["0", "1"]
    assert second.take("core", ["0", "1", "2"], 2) == ["2"]
    assert second.take("gpu", ["0"], 1) == ["0"]  # of another kind
    first.release()
    assert Reservation(tmp_path).take("core", ["0", "1", "2"], 3) == ["0", "1"]


def test_where_there_is_no_folder_everybody_takes_the_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        assert Reservation(tmp_path / "file").take("core", ["0", "1"], 1) == ["0"]


def test_pools_take_different_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.os, "sched_getaffinity", lambda pid: {2, 5, 7})
    run, lines = load_run(RUN), []
    pools = [Reservation(tmp_path) for _ in range(3)]
    assert executors.assign_slots(run, 1, lines.append, pools[0]) == [Slot(cores=(2,))]
    assert executors.assign_slots(run, 2, lines.append, pools[1]) == [Slot(cores=(5,)), Slot(cores=(7,))]
    assert not lines
    assert executors.assign_slots(run, 1, lines.append, pools[2]) == [Slot()]
    assert lines == ["other trials run on 3 of 3 cores of this machine: their seconds disturb each other"]


def test_pools_take_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "list_visible_gpus", lambda: ["0", "1", "2"])
    run, lines = load_run(RUN), []
    first, second = Reservation(tmp_path), Reservation(tmp_path)
    assert executors.assign_slots(run, 2, lines.append, first) == [Slot(gpu="0"), Slot(gpu="1")]
    assert executors.assign_slots(run, 1, lines.append, second) == [Slot(gpu="2")]
    assert not lines
    # Too few are left: the third pool shares, and says so.
    third = Reservation(tmp_path)
    assert executors.assign_slots(run, 2, lines.append, third) == [Slot(gpu="0"), Slot(gpu="1")]
    assert lines == ["other trials run on 3 of 3 GPUs of this machine: their seconds disturb each other"]
