"""Energy from RAPL's files in their own format; NVML needs a GPU and is not run here."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from harness.interface.ranks import Ranks
from harness.trial import energy
from harness.trial.record import Record
from harness.trial.trial import _Trial

CPU = torch.device("cpu")


def zone(powercap: Path, number: str, name: str, microjoules: int) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_are_added_up_over_the_counters_end(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "0", "package-0", 5_000_000), zone(tmp_path, "1", "package-1", 999_000_000)
    zone(tmp_path, "0:0", "core", 0)
    meter = energy.make_meter(CPU, tmp_path)
    assert meter is not None and meter.source == "rapl"
    meter.start()
    first.write_text("7500000\n")
    second.write_text("500000\n")
    zone(tmp_path, "0:0", "core", 900_000_000)
    assert meter.stop() == pytest.approx(2.5 + 1.5)


def test_what_cannot_be_read_is_no_meter(tmp_path: Path) -> None:
    assert energy.make_meter(CPU, tmp_path) is None
    zone(tmp_path, "0", "package-0", 1).write_text("not a number\n")
    assert energy.make_meter(CPU, tmp_path) is None
    zone(tmp_path, "0", "psys", 1)
    assert energy.make_meter(CPU, tmp_path) is None


@pytest.mark.parametrize("readable", [True, False])
def test_a_record_holds_energy_where_it_was_read_and_nothing_elsewhere(
    trial: Callable[..., Record], monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    joules = iter(range(1, 1000))
    counter = energy.Meter("rapl", [(lambda: float(next(joules)), 1e9)])
    monkeypatch.setattr("harness.trial.clock.make_meter", lambda device: counter if readable else None)
    record = trial("workload.target=100", "run_to_end=true")
    with record.path.evaluations.open() as file:
        rows = list(csv.DictReader(file))
    if readable:
        used = [float(row["accumulated_energy_joules"]) for row in rows]
        assert used[0] > 0 and used == sorted(used)
        assert record.manifest.final.energy_joules_to_target == used[0]
    else:
        assert "accumulated_energy_joules" not in rows[0]
        assert "energy_joules_to_target" not in record.manifest.final.model_fields_set


JOULES = "accumulated_energy_joules"


@pytest.mark.parametrize(
    ("device", "other", "total"),
    [("cuda", {JOULES: 5.0}, 8.0), ("cuda", {}, None), ("cpu", {}, 3.0)],
    ids=["two GPUs", "one of them unreadable", "packages, counted by rank 0"],
)
def test_ranks_add_up_their_energy_or_have_none(device: str, other: dict[str, float], total: float | None) -> None:
    row = {"peak_memory_bytes": 1, "optimizer_state_bytes": 1, "accumulated_data_wait_time": 0.0}
    ranks = SimpleNamespace(all_gather=lambda local_row: [local_row, row | other])
    seen = SimpleNamespace(ranks=ranks, training=SimpleNamespace(device=torch.device(device)))
    assert _Trial._combine_ranks(cast(_Trial, seen), row | {JOULES: 3.0}).get(JOULES) == total


@pytest.mark.parametrize(("rank", "energy"), [(0, 8.0), (1, 0.0)])
def test_energy_of_several_ranks_is_taken_up_once(rank: int, energy: float) -> None:
    clock = SimpleNamespace(meter=object(), elapsed=SimpleNamespace(energy=3.0))
    seen = SimpleNamespace(ranks=Ranks(rank, 2), clock=clock, record=SimpleNamespace(rows=[{JOULES: 8.0}]))
    _Trial._resume_energy(cast(_Trial, seen))
    assert clock.elapsed.energy == energy
