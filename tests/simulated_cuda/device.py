"""The simulated device itself: tensors, torch.cuda's functions, and the record of what makes the host wait.

Imported in a process that has called `library.load`.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
SOURCES = tuple(str(ROOT / folder) for folder in ("harness", "workloads", "submissions", "tests/harness"))

# Operations whose CUDA implementation reads a result on the host: a size, a status, or whether a value is valid.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::repeat_interleave.Tensor", "aten::multinomial",
    "aten::bincount", "aten::_linalg_check_errors", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_eig",
    "aten::linalg_lstsq", "aten::segment_reduce",
}  # fmt: skip
# Operations that refuse to run on CUDA under torch.use_deterministic_algorithms(True).
NONDETERMINISTIC = {
    "aten::kthvalue", "aten::median.dim", "aten::nanmedian.dim", "aten::histc", "aten::put_",
    "aten::_adaptive_avg_pool2d_backward", "aten::adaptive_max_pool2d_backward", "aten::max_pool3d_with_indices",
    "aten::nll_loss2d_forward", "aten::grid_sampler_2d_backward",
}  # fmt: skip


class Waits:
    """What made the host wait, by place in the source, while `counting`."""

    def __init__(self) -> None:
        self.counting = False
        self.places: Counter[str] = Counter()

    def add(self, operation: str) -> None:
        """Count `operation` at the innermost line of the project that led to it."""
        if self.counting:
            self.places[f"{_source_line()}: {operation}"] += 1

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        """Count within the body."""
        self.counting, before = True, self.counting
        try:
            yield
        finally:
            self.counting = before


waits = Waits()


class Memory:
    """Bytes of the storages on the device that are alive, and their largest sum."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self._tensors: Counter[int] = Counter()
        # By the number of its reference, which costs a tenth of a weakref.finalize.
        self._storages: dict[int, tuple[weakref.ref[CudaTensor], int, int]] = {}

    def add(self, tensor: CudaTensor) -> None:
        """Count the storage of a new tensor until the last tensor on it is gone."""
        storage = tensor.on_host.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self._tensors[address]:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._tensors[address] += 1
        reference = weakref.ref(tensor, self._remove)
        self._storages[id(reference)] = reference, address, size

    def _remove(self, reference: weakref.ref[CudaTensor]) -> None:
        _, address, size = self._storages.pop(id(reference))
        self._tensors[address] -= 1
        if not self._tensors[address]:
            del self._tensors[address]
            self.allocated -= size

    def reset_peak(self) -> None:
        """As torch.cuda.reset_peak_memory_stats."""
        self.peak = self.allocated


memory = Memory()


class CudaTensor(Tensor):
    """A tensor that says it is on the device; its values are in `on_host`."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        tensor.on_host = inner
        memory.add(tensor)
        return tensor

    def tolist(self) -> Any:
        waits.add("tolist")
        return self.detach().on_host.tolist()

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.on_host.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, _: Any) -> CudaTensor:
        return CudaTensor(self.detach().on_host.clone()).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.detach().on_host, self.requires_grad)

    def __repr__(self, **_: Any) -> str:
        return f"{self.on_host!r} on {DEVICE}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return _run(function, arguments, keywords or {})


class Device(TorchDispatchMode):
    """Within it tensors are made on the device where `device="cuda"` asks for it."""

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return _run(function, arguments, keywords or {})


def _run(function: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    name, overload, has_aliases = _describe(function)
    tensors: list[Tensor] = []
    _add_tensors(arguments, tensors)
    _add_tensors(keywords, tensors)
    on_device = any(isinstance(tensor, CudaTensor) for tensor in tensors)
    asked = keywords.get("device")
    result_on_device = on_device if asked is None else torch.device(asked).type == "cuda"
    if on_device:
        _check(name, overload, arguments, tensors)
    _record_copies(name, arguments, keywords, tensors, result_on_device)
    inner_arguments, inner_keywords = _map((arguments, keywords), lambda t: getattr(t, "on_host", t))
    if asked is not None:
        inner_keywords["device"] = "cpu"
        inner_keywords.pop("pin_memory", None)
    results = function(*inner_arguments, **inner_keywords)
    if not result_on_device or name == "aten::_local_scalar_dense":
        return results
    results = _map(results, lambda t: t if isinstance(t, CudaTensor) else CudaTensor(t))
    return return_and_correct_aliasing(function, arguments, keywords, results) if on_device and has_aliases else results


@functools.cache
def _describe(function: Any) -> tuple[str, str, bool]:
    """Name and overload of an operation, and whether a result may be an argument of it or a view of one."""
    schema = function._schema
    aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return schema.name, f"{schema.name}.{function._overloadname}", aliases


def _add_tensors(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_tensors(item, tensors)
    elif isinstance(value, dict):
        for item in value.values():
            _add_tensors(item, tensors)


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed. Several times as fast as torch's own functions on trees."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _check(name: str, overload: str, arguments: Any, tensors: list[Tensor]) -> None:
    """Record what makes the host wait, and raise what CUDA would raise."""
    if name in WAITING or overload in WAITING:
        waits.add(name.removeprefix("aten::"))
    nondeterministic = name in NONDETERMINISTIC or overload in NONDETERMINISTIC
    nondeterministic |= name in ("aten::cumsum", "aten::cumprod") and arguments[0].is_floating_point()
    if nondeterministic and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name} CUDA does not have a deterministic implementation")
    if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
        for index in arguments[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                waits.add("index by a mask")
            elif index is not None and not isinstance(index, CudaTensor):
                waits.add("index from the host")
    elif name not in ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::_foreach_copy"):
        # A scalar of the CPU goes along as an argument of the kernel.
        mixed = [t for t in tensors if not isinstance(t, CudaTensor) and t.ndim > 0]
        if mixed and "_fused_" not in name:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but one {tuple(mixed[0].shape)} is on the CPU"
            )


def _record_copies(
    name: str, arguments: Any, keywords: dict[str, Any], tensors: list[Tensor], result_on_device: bool
) -> None:
    if name == "aten::_to_copy":
        pairs = [(arguments[0], result_on_device)]
        non_blocking = keywords.get("non_blocking", False)
    elif name == "aten::copy_":
        pairs = [(arguments[1], isinstance(arguments[0], CudaTensor))]
        non_blocking = arguments[2] if len(arguments) > 2 else keywords.get("non_blocking", False)
    elif name == "aten::_foreach_copy_":
        pairs = [(s, isinstance(t, CudaTensor)) for t, s in zip(arguments[0], arguments[1], strict=True)]
        non_blocking = arguments[2] if len(arguments) > 2 else keywords.get("non_blocking", False)
    else:
        return
    for source, to_device in pairs:
        from_device = isinstance(source, CudaTensor)
        if from_device == to_device:
            continue
        direction = "host to device" if to_device else "device to host"
        if not non_blocking:
            waits.add(f"copy from {direction}")
        elif to_device and not is_pinned(source):
            # The driver may wait for the stream before it stages pageable memory.
            waits.add(f"copy from {direction} out of pageable memory")


def _source_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(SOURCES):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "?"


# ---- tensors from numbers ------------------------------------------------------------------------------------------

_torch_tensor, _torch_as_tensor = torch.tensor, torch.as_tensor


def tensor(data: Any, *, device: Any = None, **keywords: Any) -> Tensor:
    """As torch.tensor, which makes a tensor on the host and waits until its copy is on the device."""
    made = _torch_tensor(data, **keywords)
    return made if device is None else made.to(device)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """As torch.as_tensor."""
    made = _torch_as_tensor(data, dtype=dtype)
    return made if device is None else made.to(device)


# ---- pinned memory and files ---------------------------------------------------------------------------------------

_pinned: dict[int, Tensor] = {}


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy that counts as pinned, kept alive so that its address stays its own."""
    if isinstance(tensor, CudaTensor):
        raise RuntimeError("cannot pin a tensor of the device; only dense CPU tensors can be pinned")
    copy = tensor.detach().clone()
    _pinned[copy.untyped_storage().data_ptr()] = copy
    return copy


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether the values lie in pinned memory."""
    return tensor.untyped_storage().data_ptr() in _pinned


_map_location: list[Any] = [None]
_torch_load = torch.load


def _rebuild(inner: Tensor, requires_grad: bool) -> Tensor:
    location = _map_location[0]
    if location is not None and torch.device(location).type == "cpu":
        return inner.requires_grad_(requires_grad)
    return CudaTensor(inner).requires_grad_(requires_grad)


def load(file: Any, map_location: Any = None, **keywords: Any) -> Any:
    """As torch.load for files of this process: tensors of the device are on it again unless map_location forbids it."""
    _map_location[0] = map_location
    try:
        value = _torch_load(file, map_location="cpu", **keywords)
    finally:
        _map_location[0] = None
    if map_location is not None and torch.device(map_location).type == "cuda":
        value = _map(value, lambda t: t if isinstance(t, CudaTensor) else CudaTensor(t))
    return value


# ---- torch.cuda ----------------------------------------------------------------------------------------------------


class Event:
    """An event, at the host's time: the device is never behind."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        assert self.seconds is not None and end.seconds is not None
        return 1e3 * (end.seconds - self.seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits.add("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        """Make a stream wait, not the host."""


class Stream:
    """A stream on which everything is done at once."""

    def synchronize(self) -> None:
        waits.add("Stream.synchronize")

    def wait_stream(self, other: Any) -> None:
        """Make this stream wait, not the host."""

    def wait_event(self, event: Event) -> None:
        """Make this stream wait, not the host."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


def install() -> None:
    """Put the simulation into torch, for the rest of this process."""
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(name="Simulated GPU", total_memory=2**34, major=9, minor=0)
    stream = Stream()
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **_: function(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: waits.add("torch.cuda.synchronize"),
        # The generator of the CPU draws, and whoever seeds this one has seeded that one too.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: memory.allocated,
        "max_memory_allocated": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": Event,
        "Stream": Stream,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[method-assign, assignment]
    torch.tensor, torch.as_tensor, torch.load = tensor, as_tensor, load
    torch.serialization.add_safe_globals([_rebuild])
    # A parameter of this class cannot take over the values of one of the CPU's; Module.to makes new ones.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _foreach_supported_types.append(CudaTensor)
