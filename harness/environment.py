"""The environment of a trial: device, threads, determinism, compiler cache. The same under every way of starting it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from harness.config import Run
from harness.problems import UserError
from harness.ranks import launched, local_rank, local_size


def device_of(run: Run) -> torch.device:
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launched() and name != "cpu":
        if name != "cuda":
            raise UserError(f"device={name}: of several processes, each takes a GPU of its own; use device=cuda")
        name = f"cuda:{local_rank()}"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device={run.device}: torch {torch.__version__} sees no GPU here; use device=cpu")
        index = int(name.partition(":")[2] or 0)
        if launched() and local_size() > torch.cuda.device_count():  # found by every rank, whose GPU may be there
            raise UserError(
                f"{local_size()} processes on this machine, of which each takes a GPU of its own, but there are "
                f"{torch.cuda.device_count()} GPUs; start at most as many, or use device=cpu"
            )
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device={run.device}: GPU {index} was asked for, but there are {torch.cuda.device_count()}, counted "
                "from 0"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def configure_torch(run: Run, device: torch.device) -> None:
    torch.set_num_threads(run.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    torch.use_deterministic_algorithms(run.deterministic)
    # Filling fresh memory with NaN is a debugging aid that would be charged to the submission.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Stated, whatever torch's default is: it differs between products and convolutions.
    products = "tf32" if run.precision == "tf32" else "ieee"
    cudnn: Any = torch.backends.cudnn
    torch.backends.cuda.matmul.fp32_precision = cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = products
    torch.backends.cudnn.benchmark = not run.deterministic


@contextmanager
def private_compiler_cache(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    import torch._dynamo

    torch._dynamo.reset()  # what an earlier trial of this process compiled must be paid for again
    with tempfile.TemporaryDirectory(prefix="pacemark-compile-") as folder, ExitStack() as stack:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        stack.callback(_restore_environment, "TORCHINDUCTOR_CACHE_DIR", before)
        yield


def _restore_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
