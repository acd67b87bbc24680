"""Energy from RAPL's files in their own format; NVML needs a GPU and is not run here."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import energy
from harness.record import Record

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
    meter = energy.meter(CPU, tmp_path)
    assert meter is not None and meter.source == "rapl"
    meter.start()
    first.write_text("7500000\n")
    second.write_text("500000\n")
    zone(tmp_path, "0:0", "core", 900_000_000)
    assert meter.stop() == pytest.approx(2.5 + 1.5)


def test_what_cannot_be_read_is_no_meter(tmp_path: Path) -> None:
    assert energy.meter(CPU, tmp_path) is None
    zone(tmp_path, "0", "package-0", 1).write_text("not a number\n")
    assert energy.meter(CPU, tmp_path) is None
    zone(tmp_path, "0", "psys", 1)
    assert energy.meter(CPU, tmp_path) is None


@pytest.mark.parametrize("readable", [True, False])
def test_a_record_holds_energy_where_it_was_read_and_nothing_elsewhere(
    trial: Callable[..., Record], monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    joules = iter(range(1, 1000))
    counter = energy.Meter("rapl", [(lambda: float(next(joules)), 1e9)])
    monkeypatch.setattr("harness.clock.meter", lambda device: counter if readable else None)
    record = trial("workload.target=100", "run_to_end=true")
    with record.csv_path.open() as file:
        rows = list(csv.DictReader(file))
    if readable:
        used = [float(row["accumulated_energy_joules"]) for row in rows]
        assert used[0] > 0 and used == sorted(used)
        assert record.manifest["final"]["energy_joules_to_target"] == used[0]
    else:
        assert "accumulated_energy_joules" not in rows[0]
        assert "energy_joules_to_target" not in record.manifest["final"]
