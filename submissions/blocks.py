"""How a CPU goes through the parameters of an elementwise rule: large ones in pieces, small ones together.

An operation on a large tensor reads from memory what the one before has written; on a piece, from the cache. An
operation on a small tensor takes less time than its call, so small ones are copied into one, and their state is kept in
one. Neither changes a bit, but for sigmoid: on the last elements of a tensor, which fill no vector of the processor, it
rounds differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

VECTOR = 64
"""A multiple of the elements that a CPU's vector operations take at once."""


class Piece(NamedTuple):
    """A part of a parameter: elements `start` to `stop` in the order of its memory."""

    order: torch.memory_format
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor of the parameter's shape; a view if its memory has the same order."""
        return _flatten(tensor, self.order)[self.start : self.stop]


@dataclass(slots=True)
class Row:
    """One entry of a bucket's lists: a parameter, a piece of one, or several together."""

    parameters: list[Tensor]
    value: Tensor
    """As the model holds it, or a copy of several parameters."""
    g: Tensor
    state: dict[str, Any]
    piece: Piece | None = None
    """The part of the parameter; None: all of it."""
    stored: Sequence[Tensor] = ()
    """The parameters that the new value has to be copied to; empty: value is the parameter's own memory."""

    def find(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """Of tensors by parameter the one for this row."""
        if self.piece is not None:
            return self.piece.of(values[self.parameters[0]])
        if self.stored:
            return _flatten_dense_tensors([values[parameter] for parameter in self.parameters])
        return values[self.parameters[0]]

    def copies(self, value: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The parameters, or the piece, for which `value` holds copies, each with its part of it."""
        if self.stored:
            return list(zip(self.stored, _unflatten_dense_tensors(value, self.stored), strict=True))
        return [(self.value, value)]

    def shaped_state(self) -> dict[str, Tensor]:
        """The state tensors of the value's shape."""
        shape = self.value.shape
        return {name: s for name, s in self.state.items() if isinstance(s, Tensor) and s.shape == shape}


def cut(row: Row, block: float) -> Iterator[Row]:
    """The pieces of a parameter of more than `block` elements; the row itself otherwise, and where the parameter, its
    gradient and its state do not lie in memory in the same order."""
    size = row.value.numel()
    shaped = row.shaped_state() if size > block else {}
    order = _common_order([row.value, row.g, *shaped.values()]) if size > block else None
    if order is None:
        yield row
        return
    # Whole vectors, so that no element of the parameter gets into the rest of a tensor that was not there before.
    length = max(1, int(block) // VECTOR) * VECTOR
    columns = [_flatten(tensor, order).split(length) for tensor in (row.value, row.g, *shaped.values())]
    for k, (value, g, *states) in enumerate(zip(*columns, strict=True)):
        piece = Piece(order, k * length, min(size, (k + 1) * length))
        yield Row(row.parameters, value, g, row.state | dict(zip(shaped, states, strict=True)), piece)


class Packs:
    """The small parameters that a rule updates together, with their common state, which is kept from step to step."""

    def __init__(self) -> None:
        # By the first parameter of each pack, for each name in the state: one tensor, and the parts of it that are the
        # parameters' own state.
        self._known: dict[Tensor, dict[str, tuple[Tensor, Sequence[Tensor]]]] = {}
        # Parameters that are not in rows in memory, or have state of another shape.
        self._others: set[Tensor] = set()

    def takes(self, parameter: Tensor, small: int) -> bool:
        """Whether a parameter is one for `pack`: of at most `small` elements."""
        # The set is asked last, and hardly ever, since torch computes hashes of tensors in Python.
        return parameter.is_cpu and 0 < parameter.numel() <= small and not (self._others and parameter in self._others)

    def pack(self, parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]) -> list[Row]:
        """One row for parameters of equal dtype and equal step; some rows, when some turn out not to fit."""
        if len(parameters) > 1 and (common := self._common_state(parameters, states)) is not None:
            value, g = _flatten_dense_tensors(parameters), _flatten_dense_tensors(gradients)
            return [Row(parameters, value, g, states[0] | common, stored=parameters)]
        return [Row([p], p, g, state) for p, g, state in zip(parameters, gradients, states, strict=True)]

    def _common_state(self, parameters: list[Tensor], states: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """State tensors of all parameters, one-dimensional, of which each parameter's own state is a part. None if a
        parameter turns out not to fit."""
        known = self._known.get(parameters[0])
        # Other tensors stand in the state at the first step, after a load, and when other parameters have a gradient.
        if known is None or not all(
            len(parts) == len(states)
            and all(state.get(name) is part for state, part in zip(states, parts, strict=True))
            for name, (_, parts) in known.items()
        ):
            fits = [_fits(parameter, state) for parameter, state in zip(parameters, states, strict=True)]
            if not all(fits):
                self._others |= {parameter for parameter, fit in zip(parameters, fits, strict=True) if not fit}
                return None
            known = {}
            for name in [name for name, value in states[0].items() if isinstance(value, Tensor)]:
                tensors = [state[name] for state in states]
                together = _flatten_dense_tensors(tensors)
                known[name] = together, _unflatten_dense_tensors(together, tensors)
                for state, part in zip(states, known[name][1], strict=True):
                    state[name] = part
            self._known[parameters[0]] = known
        return {name: together for name, (together, _) in known.items()}


def _fits(parameter: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter is in rows in memory, and all its state has its shape."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return all(tensor.is_contiguous() and tensor.shape == parameter.shape for tensor in (parameter, *tensors))


def _common_order(tensors: Sequence[Tensor]) -> torch.memory_format | None:
    """The order in which all the tensors lie in memory without gaps; None where they differ or have gaps."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return torch.contiguous_format
    if all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        return torch.channels_last
    return None


def _flatten(tensor: Tensor, order: torch.memory_format) -> Tensor:
    """All elements in an order of `_common_order`, one-dimensional; a view if they lie in memory like this."""
    return (tensor.permute(0, 2, 3, 1) if order == torch.channels_last else tensor).reshape(-1)
