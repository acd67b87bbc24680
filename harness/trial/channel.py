"""Messages between the judge and the process of the submission: tensors, numbers, texts and containers of them.

Nothing in a message is executed on arrival: it is read with `weights_only=True`.
"""

from __future__ import annotations

import io
import json
import socket
import struct
from typing import Any

import torch

from harness.interface.submission import collect_tensors
from harness.processes import interrupts_deferred

_LENGTH = struct.Struct("<Q")


class ChannelClosed(Exception):
    """The other process has ended."""


class Channel:
    """One end of a connected pair of sockets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any]) -> None:
        """Send a message whole. Raises ChannelClosed."""
        content = _encode(message)
        try:
            self._connection.sendall(_LENGTH.pack(len(content)))
            self._connection.sendall(content)
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> dict[str, Any]:
        """Wait for a message, with all tensors on the CPU. Raises ChannelClosed, and ValueError for what is none."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        content = self._read(length)
        try:
            message = _decode(content)
        except Exception as error:
            raise ValueError(f"a message that cannot be read: {error}") from error
        if not isinstance(message, dict):
            raise ValueError(f"a message that is no mapping: {type(message).__name__}")
        return message

    def _read(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError as error:
                raise ChannelClosed from error
            if not count:
                raise ChannelClosed
            view = view[count:]
        return content

    def close(self) -> None:
        """Close this end; the other one's next message fails."""
        self._connection.close()


def _encode(message: dict[str, Any]) -> bytes | memoryview:
    # Most messages hold no tensors, and JSON is a hundred times as fast.
    if not collect_tensors(message):
        try:
            return json.dumps(message).encode()
        except TypeError:
            # For example a set in the state of an optimizer.
            pass
    buffer = io.BytesIO()
    with interrupts_deferred():
        torch.save(message, buffer)
    return buffer.getbuffer()


def _decode(content: bytearray) -> Any:
    if content.startswith(b"{"):
        return json.loads(content)
    with interrupts_deferred():
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
