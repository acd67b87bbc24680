"""Specifications of the shipped mini workloads, and a small Fashion-MNIST that needs no download."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness.interface.workload import WorkloadSpec
from workloads.data import fashion_mnist
from workloads.data.fashion_mnist import Images

CONFIGS = Path(__file__).parents[2] / "configs" / "workload"

Splits = dict[str, Images]


@pytest.fixture
def make_spec() -> Callable[..., WorkloadSpec]:
    """make_spec("vit", data={...}): the specification at scale=mini, with single options replaced."""

    def compose(name: str, **changes: dict[str, Any]) -> WorkloadSpec:
        merged: dict[str, Any] = {}
        for path in (CONFIGS / f"{name}.yaml", CONFIGS / "scale" / f"{name}-mini.yaml"):
            merged |= yaml.safe_load(path.read_text())
        return WorkloadSpec(**merged | {key: merged[key] | options for key, options in changes.items()})

    return compose


@pytest.fixture
def keys() -> torch.Tensor:
    """64 keys as the harness draws them, the smallest and the largest among them."""
    drawn = torch.randint(0, 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0))
    drawn[0], drawn[1] = 0, 2**63 - 1
    return drawn


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """300 training and 40 test images of noise, whose hashes the loader expects."""
    random = np.random.default_rng(0)
    splits = {
        name: Images(random.integers(0, 256, (n, 28, 28), np.uint8), random.integers(0, 10, n, np.uint8))
        for name, n in (("train", 300), ("test", 40))
    }
    monkeypatch.setattr(fashion_mnist, "SHA256", {name: split.sha256 for name, split in splits.items()})
    return splits


@pytest.fixture
def idx_folder(noise: Splits, tmp_path: Path) -> Path:
    """The noise as four IDX files, images compressed and labels not."""
    for name, split in (("train", noise["train"]), ("t10k", noise["test"])):
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(split.images), 1))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(split.labels))
    return tmp_path


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
