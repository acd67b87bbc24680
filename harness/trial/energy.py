"""Energy that the GPUs (by NVIDIA's NVML) or the processor packages (by Intel's RAPL) used while the clock ran.

NVML counts one GPU, so a trial's figure is its own. RAPL counts whole packages, with everything else that ran on them.
Where neither can be read there is no figure; it is never zero.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.processes import local_rank

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules used between `start` and `stop`. source: nvml or rapl."""

    def __init__(self, source: str, counters: list[tuple[Callable[[], float], float]]) -> None:
        """counters: for each, a function that reads it in joules, and the value at which it wraps around to zero."""
        self.source = source
        self._counters = counters
        self._last: list[float] = []

    def start(self) -> None:
        """Read the counters; `stop` counts from here."""
        self._last = [read() for read, _ in self._counters]

    def stop(self) -> float:
        """Joules since `start`, summed over the counters. Each may have wrapped around once."""
        now = [read() for read, _ in self._counters]
        limits = [limit for _, limit in self._counters]
        # Modulo corrects for one wrap-around; an infinite limit leaves the difference as it is.
        return sum((b - a) % limit for a, b, limit in zip(self._last, now, limits, strict=True))


def make_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter | None:
    """A meter of the GPU, or of this machine's processor packages on a CPU; None where they cannot be read."""
    if device.type == "cuda":
        return _nvml_meter(device)
    # The packages are counted once for all processes of the machine.
    return _rapl_meter(powercap) if device.type == "cpu" and local_rank() == 0 else None


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Driver, maximum clocks in MHz and power limit in watts, as far as NVML tells."""
    nvml, handle = _nvml(device)
    description: dict[str, Any] = {}
    if nvml is None:
        return description
    for name, read in {
        "gpu_driver": lambda: str(nvml.nvmlSystemGetDriverVersion()),
        "gpu_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "gpu_memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "gpu_power_limit_watts": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
    }.items():
        with suppress(nvml.NVMLError):
            description[name] = read()
    return description


def _nvml(device: torch.device) -> tuple[Any, Any]:
    import torch

    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # By UUID: NVML ignores CUDA_VISIBLE_DEVICES, so its indices differ from those of torch.
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:
        # Not installed, no driver, a GPU that NVML does not know: all mean that there is no figure.
        return None, None


def _nvml_meter(device: torch.device) -> Meter | None:
    """A meter of one GPU; None where NVML or its energy counter is missing."""
    nvml, handle = _nvml(device)
    if nvml is None:
        return None

    def read() -> float:
        # NVML counts millijoules since the driver was loaded, and does not wrap around.
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    try:
        read()
    except nvml.NVMLError:  # before Volta
        return None
    return Meter("nvml", [(read, float("inf"))])


def _rapl_meter(powercap: Path) -> Meter | None:
    counters: list[tuple[Callable[[], float], float]] = []
    try:
        # The pattern also finds parts of packages and the whole platform; adding them would count energy twice.
        for zone in sorted(powercap.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                file, limit = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) / 1e6
                counters.append((lambda file=file: int(file.read_text()) / 1e6, limit))  # type: ignore[misc]
                # Read once now, to find out whether this process may.
                counters[-1][0]()
    except (OSError, ValueError):  # readable by root alone on most systems
        return None
    return Meter("rapl", counters) if counters else None
