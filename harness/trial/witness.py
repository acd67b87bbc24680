"""What the process of a submission sees of it, for whoever reviews the record (docs/fair_play.md).

A `Witness` stands beside one training. It counts the forward passes of the model by a hook, compares weights and
buffers across every section that is off the clock, and notes what the submission opens, connects to and starts. It
lives in the submission's own process, so it is evidence and no proof: what it cannot see, the judge does
(harness/trial/remote_training.py).
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from harness.processes import SOURCE_ROOT

MAX_NOTED = 20
"""Files, addresses and programs that a record lists, of each."""


@dataclass
class EvidenceCounters:
    """The columns of `harness.records.evaluations.EVIDENCE_COLUMNS`. None: not known here, and left out of the row."""

    counted_forward_examples: int = 0
    off_clock_forward_examples: int = 0
    off_clock_changes: int = 0
    accumulated_children_cpu_time: float = 0.0
    accumulated_off_clock_cpu_time: float | None = None
    accumulated_second_clock_time: float | None = None
    accumulated_second_cpu_time: float | None = None

    def columns(self) -> dict[str, int | float]:
        """The columns of a row."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Witness:
    """Watches one training from within its process."""

    def __init__(self, *, listens: bool = True) -> None:
        """listens: whether to note what Python opens and starts while the training clock runs."""
        self.counters = EvidenceCounters()
        self.notes = Notes()
        self.listens = listens
        self.owns_process = False
        """Whether the process is the submission's alone, so that all that it starts and opens is the submission's."""
        self.threads = torch.get_num_threads()
        """Most threads that torch was set to when a section on the clock ended."""
        self.model_changes: list[str] = []
        self._model: nn.Module | None = None
        self.structure: list[str] = []
        """Of the model as the workload built it."""
        self._ignores_hooks = False
        self._on_clock = False
        # The harness's own passes, such as evaluations, are not the submission's.
        self._counting = True
        self._fingerprint: list[Tensor] | None = None
        self._children_before = children_cpu_seconds()

    def __deepcopy__(self, memo: dict[int, Any]) -> Witness:
        # The hook refers to it, and a submission may copy the model.
        return self

    # ---- the model -------------------------------------------------------------------------------------------------

    def watch(self, model: nn.Module, *, ignores_hooks: bool) -> None:
        """Count the forward passes of `model` from now on. ignores_hooks: the submission may set hooks of its own."""
        model.register_forward_pre_hook(self._count_forward, with_kwargs=True)
        self._model, self._ignores_hooks = model, ignores_hooks
        self.structure = describe_structure(model, ignores_hooks)

    def start_counting(self) -> None:
        """Forget the passes so far, which were the harness's own."""
        self.counters = EvidenceCounters()

    def count_compiled(self, examples: int) -> None:
        """Count a pass of the compiled model, in which no hook counts."""
        if self._counting:
            self._add_examples(examples)

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """Within it passes are the harness's own."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def _count_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In a compiled graph, Python counts nothing; see count_compiled.
        if torch.compiler.is_compiling() or not self._counting:
            return
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if inputs is not None and inputs.ndim:
            self._add_examples(len(inputs))

    def _add_examples(self, examples: int) -> None:
        self.counters.counted_forward_examples += examples
        if not self._on_clock:
            self.counters.off_clock_forward_examples += examples

    # ---- the clock -------------------------------------------------------------------------------------------------

    @contextmanager
    def on_clock(self) -> Iterator[None]:
        """Within it the training clock runs. Between two such sections weights and buffers must not change."""
        # Where there is a judge, it asks for this and for `begin_pause`, so that its own clock does not count them.
        if not self.owns_process:
            self.end_pause()
            self._children_before = children_cpu_seconds()
        self._on_clock = True
        try:
            with listen(self.notes) if self.listens else nullcontext():
                yield
        finally:
            self._on_clock = False
            if not self.owns_process:
                self.begin_pause()

    def end_pause(self) -> None:
        """Compare weights and buffers with those at the end of the last section on the clock."""
        if self._fingerprint is not None and self._model is not None:
            now = fingerprint(self._model)
            changed = len(now) != len(self._fingerprint) or any(
                not torch.equal(a, b) for a, b in zip(now, self._fingerprint, strict=True)
            )
            self.counters.off_clock_changes += changed
        self._fingerprint = None

    def forget_pause(self) -> None:
        """The harness itself has changed the weights: a checkpoint was loaded."""
        self._fingerprint = None

    def begin_pause(self) -> None:
        """Note weights, buffers and whatever else must not change until the next section on the clock."""
        if self._model is None:
            return
        self._fingerprint = fingerprint(self._model)
        self.threads = max(self.threads, torch.get_num_threads())
        # Looking at all processes takes milliseconds; where there is a judge, it does so.
        if not self.owns_process:
            self.counters.accumulated_children_cpu_time += max(0.0, children_cpu_seconds() - self._children_before)
        changes = set(self.model_changes)
        for line in sorted(set(describe_structure(self._model, self._ignores_hooks)) ^ set(self.structure)):
            if line not in changes and len(self.model_changes) < MAX_NOTED:
                self.model_changes.append(line)


def fingerprint(model: nn.Module) -> list[Tensor]:
    """A 64-bit fingerprint of each parameter and buffer, on its device, without waiting for it."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]
    if hasattr(torch, "hash_tensor"):
        return [torch.hash_tensor(tensor) for tensor in tensors]
    return [tensor.double().sum() for tensor in tensors]


def module_files() -> set[str]:
    """The files of the modules that are loaded, and what Python keeps of them."""
    files = {getattr(module, key, None) for module in list(sys.modules.values()) for key in ("__file__", "__cached__")}
    return {file for file in files if isinstance(file, str)}


def describe_structure(model: nn.Module, ignores_hooks: bool = False) -> list[str]:
    """A line for each module of a model, with its class, parameters and whatever replaces its forward."""
    lines = []
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        tensors = [
            f"{key}{tuple(value.shape)}:{str(value.dtype).removeprefix('torch.')}"
            for key, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        ]
        patched = ["forward replaced"] * ("forward" in vars(module))
        if not ignores_hooks:
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            patched += [f"{hooks} forward hooks"] * bool(hooks)
        # Probability of dropout, momentum and the like.
        options = f"({module.extra_repr()})"
        lines.append(" ".join([f"{name or 'model'}: {kind}{options}", *tensors, *patched]))
    return lines


def children_cpu_seconds() -> float:
    """CPU seconds of the processes that this one has started, those that have ended among them."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = child.cpu_times()
                seconds += times.user + times.system
    return seconds


# ---- what Python does ----------------------------------------------------------------------------------------------


class Notes:
    """What this process opened, connected to and started while `listen` listened."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.every_file: set[str] = set()
        """All files that were opened, those too that may be."""
        self.data_files: set[str] = set()
        """Files that are data, though they may lie among the code of a library."""
        self.connections: list[str] = []
        self.programs: list[str] = []

    def copy(self) -> Notes:
        """What is noted so far."""
        copy = Notes()
        copy.files, copy.connections, copy.programs = list(self.files), list(self.connections), list(self.programs)
        return copy

    def add(self, notes: list[str], text: str) -> None:
        """Note a text once, up to `MAX_NOTED`."""
        if text not in notes and len(notes) < MAX_NOTED:
            notes.append(text)


_notes: Notes | None = None
_is_installed = False
_PROGRAM_EVENTS = {"os.system": 0, "os.exec": 0, "os.posix_spawn": 0, "subprocess.Popen": 0}
"""Audit events of starting a program, and which of their arguments names it."""
_OF_OTHERS = ("/mem", "/maps", "/environ")
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyi")


@contextmanager
def listen(notes: Notes) -> Iterator[None]:
    """Within it, note every file that is opened, every connection and every process that is started, as Python's audit
    events tell them. Code of libraries and of the harness may be opened, and what belongs to the system."""
    global _notes, _is_installed
    if not _is_installed:
        # An audit hook cannot be removed, so there is one for all trainings of the process.
        sys.addaudithook(_hear)
        _is_installed = True
    former, _notes = _notes, notes
    try:
        yield
    finally:
        _notes = former


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    notes = _notes
    if notes is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, str | bytes):
            text = _text(path)
            notes.every_file.add(text)
            if text in notes.data_files or not _may_be_opened(text, _writes(mode, flags)):
                notes.add(notes.files, _shorten(text))
    elif event == "socket.connect":
        notes.add(notes.connections, _text(arguments[1]))
    elif event in ("os.fork", "os.forkpty"):
        notes.add(notes.programs, "a copy of this process")
    elif event in _PROGRAM_EVENTS:
        notes.add(notes.programs, _shorten(_text(arguments[_PROGRAM_EVENTS[event]])))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _may_be_opened(path: str, writes: bool) -> bool:
    if path in ("/dev/null", "/proc/self/clear_refs"):
        return True
    # Python keeps what it compiles.
    if writes:
        return "/__pycache__/" in path
    if path.startswith(("/proc/", "/sys/", "/dev/", "/etc/")):
        # The memory and the open files of other processes are theirs.
        return not (path.endswith(_OF_OTHERS) or "/fd/" in path or path.startswith("/dev/shm"))
    # Python looks for modules in it, whether it is there or not.
    if path in sys.path and path.endswith(".zip"):
        return True
    return path.endswith(_CODE_SUFFIXES) and (is_library(path) or path.startswith(str(SOURCE_ROOT)))


def _shorten(path: str) -> str:
    """A path without the folders that tell about the machine."""
    parts = Path(path).parts
    return "/".join(parts[-3:]) if len(parts) > 3 else path


_LIBRARY_FOLDERS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_library(path: str) -> bool:
    """Whether a file is of Python or of an installed package."""
    return path.startswith(_LIBRARY_FOLDERS)
