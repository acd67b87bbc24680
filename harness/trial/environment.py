"""The environment of a trial: device, threads, determinism, compiler cache. The same under every way of starting it."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from harness.config.schema import Run
from harness.errors import UserError
from harness.processes import is_launched, local_rank, local_world_size

logger = logging.getLogger(__name__)


def select_device(run: Run) -> torch.device:
    """The device that `run` asks for, made current if it is a GPU; raises UserError if it is not there or is in use
    by another process that shares it with none."""
    device = resolve_device(run)
    if device.type == "cuda":
        # Current, since allocations and NCCL use the current device where none is named.
        try:
            torch.cuda.set_device(device)
        # AcceleratorError is a RuntimeError.
        except RuntimeError as error:
            raise UserError(f"device={run.device}: {device} cannot be used ({_first_line(error)})") from error
    return device


def resolve_device(run: Run) -> torch.device:
    """The device that `run` asks for; raises UserError if it is not there. Opens no CUDA context.

    Of several processes that share a trial, each takes the GPU of its number on its machine.
    """
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if is_launched() and name != "cpu":
        if name != "cuda":
            raise UserError(f"device={name}: of several processes, each takes a GPU of its own; use device=cuda")
        name = f"cuda:{local_rank()}"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(
            f"device={run.device}: torch {torch.__version__} sees no GPU here ({_why_no_gpu()}); use device=cpu"
        )
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if is_launched() and local_world_size() > count:
        # Raised by every rank, also where its own GPU is there, so that all of them end.
        raise UserError(
            f"{local_world_size()} processes on this machine, of which each takes a GPU of its own, but there are "
            f"{count} GPUs; start at most as many, or use device=cpu"
        )
    if index >= count:
        raise UserError(f"device={run.device}: GPU {index} was asked for, but there are {count}, counted from 0")
    return torch.device("cuda", index)


def _why_no_gpu() -> str:
    """The reason that torch gives where no GPU is available: a driver that is missing or too old, a build without
    CUDA, or GPUs that are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        # Fails before a context is opened.
        torch.cuda.init()
    # AssertionError: a build without CUDA.
    except (AssertionError, RuntimeError) as error:
        reason = _first_line(error)
    else:
        reason = "none is available"
    return reason if visible is None else f"{reason}; CUDA_VISIBLE_DEVICES={visible}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def configure_torch(run: Run, device: torch.device) -> None:
    """Set threads, determinism and precision of this process, independent of torch's defaults."""
    torch.set_num_threads(run.threads)
    # Deterministic cuBLAS asks for a workspace of fixed size. cuBLAS reads it when it starts, so before any product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)
    # Deterministic mode fills fresh memory with NaN, a debugging aid that would be charged to the submission.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # torch's defaults differ between matrix products and convolutions. Set by the older of torch's two interfaces,
    # which sets both: after the newer one, libraries that read the older one raise an error.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.precision == "tf32"
    # Benchmarking picks algorithms by their time, so it may pick others in the next run.
    torch.backends.cudnn.benchmark = not run.deterministic


@contextmanager
def private_compiler_cache(wanted: bool) -> Iterator[None]:
    """Within it torch.compile starts from an empty cache, so that every trial pays for its own compilation."""
    with ExitStack() as stack:
        if wanted:
            _enter_empty_compiler_cache(stack)
        yield


def use_empty_compiler_cache() -> None:
    """Let torch.compile start from an empty cache, for the rest of this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    _enter_empty_compiler_cache(stack)


def _enter_empty_compiler_cache(stack: ExitStack) -> None:
    """Let torch.compile start from an empty cache until `stack` is closed; what was compiled before is forgotten."""
    import torch._dynamo

    # Code that an earlier trial of this process compiled must be paid for again.
    torch._dynamo.reset()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pacemark-compile-"))
    logger.info("torch.compile starts from an empty cache: %s", folder)
    # TRITON_CACHE_DIR too: Inductor sets it at its first use, and would find the kernels of earlier trials there.
    for name, value in (("TORCHINDUCTOR_CACHE_DIR", folder), ("TRITON_CACHE_DIR", f"{folder}/triton")):
        # Restored before the folder is deleted, so that nothing compiles into a folder that is gone.
        stack.callback(_restore_environment, name, os.environ.get(name))
        os.environ[name] = value


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile raised `error`, and not the code that it compiled."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    return isinstance(error, BackendCompilerFailed | InductorError)


def _restore_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
