from __future__ import annotations

import pytest
import torch

from harness.trial.outcome import out_of_memory_cause


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        MemoryError(),
        # As torch.compile, cuBLAS, cuDNN, the driver and torch's allocator on a CPU say it.
        raised(RuntimeError("backend='inductor' raised:"), NO_MEMORY),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_memory_that_ran_out_is_recognised_whoever_says_it(error: BaseException) -> None:
    assert out_of_memory_cause(error) is not None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory"),
        raised(RuntimeError("wrong"), KeyError("x")),
    ],
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert out_of_memory_cause(error) is None
