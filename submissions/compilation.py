"""Elementwise rules compiled into one pass over memory, with torch.compile.

An update that torch executes operation by operation reads and writes every tensor several times. torch documents
torch.compile for optimizers: https://docs.pytorch.org/tutorials/recipes/compiling_optimizer.html, where a learning rate
that changes must be a tensor, or every step compiles again. Rules compute with many such numbers, all in Python: bias
corrections, schedules, averages of the learning rate. So a rule's equations are not handed to the compiler as they are:

1. `record` lets `direction` and `apply` run on stand-ins for the lists of tensors. This writes down the operations, and
   apart from them the numbers.
2. `CompiledUpdate` compiles the operations once for these tensors. Every step hands over its numbers as scalar tensors.

Recording takes some microseconds per step and no memory, whatever the size of the model. An `if` on the step or on a
number is no obstacle: other operations are another program, which is compiled when it first occurs.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from submissions.rule import Bucket

logger = logging.getLogger(__name__)


def _add(x: Any, y: Any, alpha: Any = None) -> Any:
    return x + (y if alpha is None else alpha * y)


def _sub(x: Any, y: Any, alpha: Any = None) -> Any:
    return x - (y if alpha is None else alpha * y)


OPERATIONS: dict[str, Any] = {
    "add": _add,
    "sub": _sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "lerp": torch.lerp,
    "addcmul": lambda x, a, b, value=1.0: x + value * a * b,
    "addcdiv": lambda x, a, b, value=1.0: x + value * a / b,
    "clamp_min": torch.maximum,
    "clamp_max": torch.minimum,
    "copy": lambda x, y: y,
    "zero": torch.zeros_like,
}
for _name in ("abs", "exp", "log", "maximum", "minimum", "reciprocal", "rsqrt", "sigmoid", "sign", "sqrt", "tanh"):
    OPERATIONS[_name] = getattr(torch, _name)
"""What each function torch._foreach_NAME does to one tensor. Numbers are scalar tensors here."""

Operand = tuple[str, int]
"""Of an operation: ("list", index of a list) or ("number", index of a number)."""
Operation = tuple[str, tuple[Operand, ...], tuple[tuple[str, Operand], ...], int]
"""Name in OPERATIONS, arguments, keyword arguments, index of the list of results, which may be an argument."""


class CannotRecord(Exception):
    """A rule does something to its tensors that is no operation of OPERATIONS."""


class Recording:
    """The operations of one update and its numbers.

    program: the operations in their order, equal for steps that differ in their numbers alone. inputs: by the index of
    their list, the lists of tensors that it works on.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.numbers: list[float] = []
        self.inputs: dict[int, Sequence[Tensor]] = {}
        self._lists = 0

    @property
    def program(self) -> tuple[Operation, ...]:
        """As in the docstring of the class."""
        return tuple(self.operations)

    def stand_in(self, tensors: Sequence[Tensor] | None = None) -> list[Any]:
        """What stands for a list of tensors: one of the bucket's, or of results."""
        if tensors is not None:
            self.inputs[self._lists] = tensors
        self._lists += 1
        return [_StandIn(self, self._lists - 1)]

    def add(self, function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """Write down a call of a torch function; its results."""
        name = function.removeprefix("_foreach_")
        in_place = name.endswith("_")
        name = name.removesuffix("_")
        if not function.startswith("_foreach_") or name not in OPERATIONS:
            raise CannotRecord(f"torch.{function}")
        operands = tuple(self._operand(arg) for arg in args)
        named = tuple((key, self._operand(value)) for key, value in kwargs.items())
        results = None if in_place else self.stand_in()
        self.operations.append((name, operands, named, operands[0][1] if results is None else results[0].index))
        return results

    def _operand(self, value: Any) -> Operand:
        if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], _StandIn):
            return "list", value[0].index
        if isinstance(value, int | float):
            self.numbers.append(float(value))
            return "number", len(self.numbers) - 1
        raise CannotRecord(f"an argument of the type {type(value).__name__}")


class _StandIn:
    """The only element of a list that stands for a list of tensors."""

    def __init__(self, recording: Recording, index: int) -> None:
        self.recording, self.index = recording, index

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any] | None:
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        if not isinstance(first, cls):
            raise CannotRecord(f"torch.{function.__name__} on other tensors than the bucket's")
        return first.recording.add(function.__name__, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        raise CannotRecord(f"Tensor.{name}")


class _RecordedBucket(Bucket):
    """A bucket of stand-ins."""

    def look_up(self, values: Any) -> list[Any]:
        return self.scratch["stand in for what is looked up"](values)


def record(bucket: Bucket, update: Callable[[Bucket], None]) -> Recording:
    """The operations and numbers of `update(bucket)`, which are not executed. Raises CannotRecord where they are not
    those of OPERATIONS."""
    recording = Recording()
    # Detached, since compiled code that writes to parameters would be prepared for their gradients.
    theta, g = recording.stand_in([theta.detach() for theta in bucket.theta]), recording.stand_in(bucket.g)
    state: dict[str, Any] = {}
    for name, value in bucket.states[0].items():
        state[name] = recording.stand_in(bucket.state(name))[0] if isinstance(value, Tensor) else value
    scratch = {"stand in for what is looked up": lambda values: recording.stand_in(bucket.look_up(values))}
    update(_RecordedBucket([], theta, g, bucket.t, [state], bucket.group, bucket.scratch | scratch))
    return recording


class CompiledUpdate:
    """Executes the updates of a rule's buckets in one pass over memory each.

    update: of a bucket, see `submissions.rule.Rule.update`.
    """

    def __init__(self, update: Callable[[Bucket], None]) -> None:
        self.update = update
        self._compiled: dict[Any, Callable[..., Any]] = {}
        # After a rule that cannot be recorded: it is executed as it is.
        self._eager = False

    def __call__(self, bucket: Bucket) -> None:
        """Update the bucket."""
        if not self._eager:
            try:
                recording = record(bucket, self.update)
            except CannotRecord as unknown:
                self._eager = True
                logger.warning("an update is executed without compilation: %s is not among the operations of "
                               "submissions/compilation.py", unknown)  # fmt: skip
        if self._eager:
            self.update(bucket)
            return
        # Equal programs on tensors of other shapes, such as those of another group, are compiled by themselves. The
        # state is laid out like the parameters.
        first = bucket.theta[0]
        layout = tuple(
            (theta.shape, theta.stride(), g.stride()) for theta, g in zip(bucket.theta, bucket.g, strict=True)
        )
        key = recording.program, first.dtype, first.device, layout
        arguments = [tensor for index in _used(recording) for tensor in recording.inputs[index]]
        # On the CPU: a scalar there is an argument of a GPU's kernel, and nothing waits for it.
        arguments += [torch.tensor(number, dtype=first.dtype) for number in recording.numbers]
        if key in self._compiled:
            self._compiled[key](*arguments)
            return
        from torch._inductor.utils import fresh_cache

        # The key says what guards would check at every step, tensor by tensor.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        # Precompiled headers take as long as a whole update, and nothing else is compiled from this cache.
        options["cpp_cache_precompile_headers"] = False
        compiled = torch.compile(_graph(recording), fullgraph=True, dynamic=False, options=options)
        # Empty, so that every trial pays for its compilation, whatever was compiled on the machine before.
        with fresh_cache():
            compiled(*arguments)
        self._compiled[key] = compiled


def _used(recording: Recording) -> list[int]:
    """The indices of the inputs that the program reads or writes."""
    touched = {index for _, operands, _, _ in recording.operations for kind, index in operands if kind == "list"}
    return sorted(touched & recording.inputs.keys())


def _graph(recording: Recording) -> fx.GraphModule:
    """A module that takes the tensors of the inputs in use, list by list, and then the numbers, and executes the
    program in place."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    used = _used(recording)

    def placeholder(name: str) -> Any:
        return fx.Proxy(graph.placeholder(name), tracer)

    originals = {k: [placeholder(f"list_{k}_{i}") for i in range(len(recording.inputs[k]))] for k in used}
    numbers = [placeholder(f"number_{k}") for k in range(len(recording.numbers))]
    lists = dict(originals)

    def values(operand: Operand, i: int) -> Any:
        kind, index = operand
        return numbers[index] if kind == "number" else lists[index][i]

    for name, operands, named, result in recording.operations:
        count = len(lists[operands[0][1]])
        lists[result] = [
            OPERATIONS[name](*(values(o, i) for o in operands), **{key: values(o, i) for key, o in named})
            for i in range(count)
        ]
    for k, tensors in originals.items():
        for tensor, value in zip(tensors, lists[k], strict=True):
            if value is not tensor:
                tensor.copy_(value)
    graph.output(None)
    return fx.GraphModule(torch.nn.Module(), graph)
