"""Building and loading device.cpp. This module does not import torch: torch asks for its devices when it is loaded."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
SECONDS = 120
"""Limit of the compilation, which takes about four."""


def missing() -> str:
    """Why the library cannot be built here; an empty string if it can."""
    return "" if shutil.which("g++") else "the simulated CUDA device takes g++"


def build(folder: Path) -> Path:
    """Compile device.cpp into `folder`; the path of the library. Raises CalledProcessError with g++'s messages."""
    torch = _torch_folder()
    library = folder / "libsimulated_cuda.so"
    command = [
        "g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", str(SOURCE), "-o", str(library),
        f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    return library


def load(library: Path) -> None:
    """Register the device with torch's libraries, before `import torch`."""
    # The library names torch's by their file names alone; loaded before it, they are found.
    for name in ("libgomp", "libc10", "libtorch_cpu"):
        for path in sorted((_torch_folder() / "lib").glob(f"{name}*.so*")):
            ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
